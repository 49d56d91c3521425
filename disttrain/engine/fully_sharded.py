"""Weights, gradients and optimizer state split over the ranks by torch's fully_shard (FSDP2).

`FullySharded` is the placement of methods that train the model whole; `ShardedBase` splits only
the frozen base under a pack (parallel.force). Invariant: each rank holds the same share of every
tensor, and only the layers that compute at the moment are whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from disttrain.config import RunConfig
from disttrain.engine.average import WeightAverage
from disttrain.engine.checkpoint import SEPARATOR, Checkpoint, check_same_tensors
from disttrain.engine.distributed import Mesh
from disttrain.engine.optim import clip_factors, make_optimizer
from disttrain.engine.placement import Outcome, WholeState, whole_copies
from disttrain.engine.replicated import Replicated
from disttrain.methods.base import Method, all_parameters
from disttrain.methods.objective import Denoiser
from disttrain.models.base import BaseModel
from disttrain.models.packed import PackedTokenEmbedding

UNITS = ("ResnetBlock2D", "BasicTransformerBlock", "CLIPEncoderLayer")
"""Layers that are made whole one at a time; what lies outside them is whole throughout a pass."""


def shard(denoiser: nn.Module, mesh: Mesh, whole: set[nn.Parameter]) -> FSDPModule:
    """Split a module's parameters over the ranks, but for those in `whole`.

    Under bf16 the layers compute in it from float32 shares; gradients are summed in float32.
    """
    half = torch.bfloat16 if mesh.accelerator.mixed_precision == "bf16" else None
    ranks = mesh.device_mesh()

    def split(module: nn.Module, cast: bool) -> None:
        policy = MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=cast)
        fully_shard(module, mesh=ranks, mp_policy=policy, ignored_params=whole)

    for module in list(denoiser.modules()):
        if type(module).__name__ in UNITS:
            split(module, cast=True)
    split(denoiser, cast=False)  # its batch holds the noise that the loss compares with
    mesh.watch(denoiser)
    assert isinstance(denoiser, FSDPModule)
    return denoiser


class FullySharded:
    """UNet and text encoder split over the ranks."""

    def __init__(self, config: RunConfig, mesh: Mesh, base: BaseModel, method: Method) -> None:
        self.mesh, self.base = mesh, base
        self.accumulation = config.train.gradient_accumulation_steps
        denoiser = Denoiser.over(base, method.trains_text).to(mesh.device)
        self._sharded = shard(denoiser, mesh, set())
        self._module: nn.Module = denoiser
        groups = method.groups()  # after the split, which makes new parameters
        self.parameters: dict[str, Tensor] = {**all_parameters(groups)}
        self.optimizer = make_optimizer(config, groups)
        decay = config.optim.ema_decay
        own = {name: _own(value) for name, value in self.parameters.items()}
        self.average = WeightAverage(own, decay) if decay else None

    @property
    def denoiser(self) -> nn.Module:
        """The module itself; fully_shard wraps nothing."""
        return self._module

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Gradients are summed over ranks after the last micro-batch only."""
        self._sharded.set_requires_gradient_sync(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Plain; nothing is scaled."""
        (loss / self.accumulation).backward()

    def step(self, finite: Sequence[bool], limits: Sequence[float]) -> Outcome:
        """All ranks see the norm of the whole gradient and decide alike."""
        own = [_own(value.grad) for value in self.parameters.values() if value.grad is not None]
        squares = torch.stack([part.double().pow(2).sum() for part in own]).sum()
        norm = self.mesh.sum(squares.view(1)).sqrt()
        outcome = Outcome(norm.tolist(), [] if all(finite) and bool(norm.isfinite()) else [0])
        if not outcome.failed:
            for part in own:
                part.mul_(clip_factors(norm, limits)[0].to(part.dtype))
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return outcome

    def gather(self) -> WholeState:
        """Tensor by tensor, so that a rank never holds more than one beside its own."""
        optimizer: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                self._keep(optimizer, f"{name}{SEPARATOR}{key}", value)
        return WholeState(self._trainables(), optimizer, self._whole_average())

    def _trainables(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            self._keep(found, name, parameter)
        return found

    def _whole_average(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if self.average is not None:
            for name, parameter in self.parameters.items():
                like: Any = parameter
                value = DTensor.from_local(
                    self.average.values[name],
                    like.device_mesh,
                    like.placements,
                    shape=like.shape,
                    stride=like.stride(),
                )
                self._keep(found, name, value)
        return found

    def _keep(self, found: dict[str, Tensor], name: str, value: Tensor) -> None:
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if self.mesh.is_main:
            found[name] = whole.detach().to("cpu", copy=True)

    def restore(self, state: Checkpoint, place: str) -> None:
        """Each rank takes its share of every tensor."""
        shapes = {name: value.shape for name, value in self.parameters.items()}
        check_same_tensors(shapes, state.trainables, place)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(_share(state.trainables[name], parameter))
                if self.average is not None:
                    self.average.values[name].copy_(_own(_share(state.average[name], parameter)))
                moments = {
                    key: state.optimizer.get(f"{name}{SEPARATOR}{key}")
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
                self.optimizer.state[parameter] = {
                    key: value.clone() if key == "step" else _share(value, parameter).clone()
                    for key, value in moments.items()
                    if value is not None
                }

    def whole(self) -> AbstractContextManager[None]:
        """Plain copies on rank zero, from gathered weights."""
        if self.average is not None:
            return whole_copies(self.base, self._whole_average())
        return whole_copies(self.base, self._trainables())

    def close(self) -> None:
        """Nothing is held elsewhere."""


class ShardedBase(Replicated):
    """A pack whose tensors lie whole on every rank over a frozen base that is split."""

    def _connect(
        self, denoiser: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        whole: Any = set(self.parameters.values())
        # Subjects that come begin with rows of the vocabulary.
        words = (m for m in denoiser.modules() if isinstance(m, PackedTokenEmbedding))
        shard(denoiser, self.mesh, whole | {layer.base.weight for layer in words})
        return denoiser, optimizer

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Nothing: `step` sums the gradients over ranks."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Plain; nothing is scaled."""
        (loss / self.config.train.gradient_accumulation_steps).backward()

    def step(self, finite: Sequence[bool], limits: Sequence[float]) -> Outcome:
        """The few trained tensors' gradients travel in one message."""
        grads = [value.grad for value in self.parameters.values() if value.grad is not None]
        means = self.mesh.mean(torch.cat([grad.flatten() for grad in grads]))
        for grad, part in zip(grads, means.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))
        return super().step(finite, limits)


def _own(value: Tensor) -> Tensor:
    """This rank's part of a tensor, which shares its memory."""
    assert isinstance(value, DTensor)
    with torch.no_grad():
        return value.to_local()


def _share(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that every rank has, split as `like` is."""
    assert isinstance(like, DTensor)
    placed = whole.to(like.device)
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)
