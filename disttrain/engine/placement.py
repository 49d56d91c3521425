"""How what trains lies over the ranks of a run: weights, gradients, the optimizer's state.

Between the pack, which knows subjects and steps, and the processes. Invariant: every placement
takes the same steps (to rounding) and saves the same whole tensors under the same names, so a
checkpoint goes on under any placement and any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from disttrain.engine.average import WeightAverage
from disttrain.engine.checkpoint import Checkpoint
from disttrain.models.parts import BaseModel, empty_copy


@dataclass(frozen=True)
class Outcome:
    """What an update did: gradient norm before clipping of each slot, and the slots that failed."""

    norms: list[float]
    failed: list[int]


@dataclass(frozen=True)
class WholeState:
    """What a checkpoint holds of a pack's tensors, whole, on rank zero; other ranks may have {}."""

    trainables: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    average: dict[str, Tensor]


class Placement(Protocol):
    """One way to lay a pack out. Every rank calls every method, in the same order."""

    parameters: dict[str, Tensor]
    """The trainable tensors by name, or this rank's parts of them."""
    optimizer: torch.optim.Optimizer
    """Has the learning rates of the coming step."""
    average: WeightAverage | None
    """The moving average of the weights, where the config asks for one."""

    @property
    def denoiser(self) -> nn.Module:
        """What a batch is given to; its result is the losses."""
        ...

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Context of one micro-batch, which may be the last of an update."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Gradients of one micro-batch, divided by the micro-batches of an update."""
        ...

    def step(self, finite: Sequence[bool], limits: Sequence[float]) -> Outcome:
        """Clip and apply the gradients of the slots whose loss was finite and whose gradient is.

        Args:
            limits: largest gradient norm of each slot; 0 means none.
        """
        ...

    def gather(self) -> WholeState:
        """Everything a step changes."""
        ...

    def restore(self, state: Checkpoint, place: str) -> None:
        """Put back what `gather` gave; not for tensors with a subject axis.

        Raises:
            CheckpointError: other names or shapes.
        """
        ...

    def whole(self) -> AbstractContextManager[None]:
        """Inside, rank zero's `base` holds complete weights, of the average if there is one, to
        draw with and to write. No step may be taken inside."""
        ...

    def close(self) -> None:
        """Let go of what is held beyond this object; nothing else may be called after it."""
        ...


@contextmanager
def whole_copies(base: BaseModel, weights: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the trained parts of rank zero's `base` are plain modules with these weights, in the
    machine's memory: they may be too large for a GPU beside what trains.

    Args:
        weights: by part and name ("unet.conv_in.weight"); empty on other ranks, which keep theirs.
    """
    if not weights:
        yield
        return
    own: dict[str, Any] = {part: getattr(base, part) for part in ("unet", "text_encoder")}
    try:
        for part, module in own.items():
            found = {
                name.removeprefix(f"{part}."): value
                for name, value in weights.items()
                if name.startswith(f"{part}.")
            }
            if found:
                setattr(base, part, _filled_copy(module, found))
        yield
    finally:
        for part, module in own.items():
            setattr(base, part, module)


def _filled_copy(module: Any, weights: dict[str, Tensor]) -> Any:
    copy = empty_copy(module)
    wanted = set(copy.state_dict())
    buffers = {name: value for name, value in module.named_buffers() if name in wanted}
    copy.load_state_dict({**buffers, **weights}, strict=True, assign=True)
    return copy.eval().requires_grad_(False)
