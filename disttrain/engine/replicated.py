"""Every rank holds everything that trains; gradients are averaged over ranks (torch's DDP).

The placement of all methods on one process, and of packs with a subject axis on any number.
Invariant: what happens to a subject depends on its own slice of each tensor only.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from disttrain.config import RunConfig
from disttrain.engine.average import WeightAverage
from disttrain.engine.checkpoint import (
    Checkpoint,
    optimizer_tensors,
    restore_optimizer,
    restore_parameters,
)
from disttrain.engine.distributed import Mesh
from disttrain.engine.optim import clip_gradients, gradient_norms, make_optimizer
from disttrain.engine.placement import Outcome, WholeState
from disttrain.methods.base import Method, all_parameters
from disttrain.methods.objective import Denoiser
from disttrain.models.base import BaseModel


class Replicated:
    """Weights, gradients and optimizer state whole on each rank."""

    def __init__(self, config: RunConfig, mesh: Mesh, base: BaseModel, method: Method) -> None:
        self.config, self.mesh, self.packed = config, mesh, config.packable
        groups = method.groups()
        self.parameters: dict[str, Tensor] = {**all_parameters(groups)}
        self.names = {value: name for name, value in self.parameters.items()}
        decay = config.optim.ema_decay
        self.average = WeightAverage(self.parameters, decay) if decay else None
        denoiser = Denoiser.over(base, method.trains_text).to(mesh.device)
        optimizer = make_optimizer(config, groups)
        self._module, self.optimizer = self._connect(denoiser, optimizer)

    def _connect(
        self, denoiser: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The module that is called and the optimizer that steps, made ready for several ranks."""
        return self.mesh.prepare(denoiser, optimizer)

    @property
    def denoiser(self) -> nn.Module:
        """The wrapped module."""
        return self._module

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Gradients travel only on the last micro-batch; Accelerate counts by itself."""
        return self.mesh.accumulate(self._module)

    def backward(self, loss: Tensor) -> None:
        """Scaled under fp16."""
        self.mesh.backward(loss)

    def step(self, finite: Sequence[bool], limits: Sequence[float]) -> Outcome:
        """Slots that failed stay as they are, uncounted. Without a subject axis all stay."""
        self.mesh.unscale(self.optimizer)
        parameters = list(self.parameters.values())
        norms = gradient_norms(parameters, self.packed)
        good = torch.tensor(finite)
        if self.mesh.scaler is None:  # the fp16 scaler skips infinite gradients by itself
            good &= norms.isfinite().cpu()
        outcome = Outcome(norms.tolist(), [i for i, fine in enumerate(good.tolist()) if not fine])
        if outcome.failed:
            self._hold_back(outcome.failed)
        clip_gradients(parameters, norms.nan_to_num(0.0, 0.0), limits)
        if len(outcome.failed) < len(limits):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return outcome

    def _hold_back(self, failed: list[int]) -> None:
        """Make the coming update leave these slots as they are."""
        for parameter in self.parameters.values():
            if parameter.grad is not None and self.packed:
                parameter.grad[failed] = 0
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"][failed] = 0

    def gather(self) -> WholeState:
        """The tensors themselves: each rank has them whole."""
        return WholeState(
            {name: value.detach() for name, value in self.parameters.items()},
            optimizer_tensors(self.optimizer, self.names),
            self.average.values if self.average is not None else {},
        )

    def restore(self, state: Checkpoint, place: str) -> None:
        """Copied into the tensors that train."""
        restore_parameters(self.parameters, state.trainables, place)
        restore_optimizer(self.optimizer, self.names, state.optimizer)
        if self.average is not None:
            restore_parameters(self.average.values, state.average, place)

    def close(self) -> None:
        """Nothing is held elsewhere."""

    def whole(self) -> AbstractContextManager[None]:
        """They are whole; the average takes their place."""
        return nullcontext() if self.average is None else self.average.applied()
