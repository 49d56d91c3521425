"""DeepSpeed ZeRO (Rajbhandari et al. 2020): what trains is split over the ranks.

Stage 1 splits the optimizer's state, 2 the gradients too, 3 the weights too; the state may lie in
the machine's memory (offload). The placement of methods that train the model whole. Invariant:
DeepSpeed never sees a batch size, accumulation, clipping or precision but this run's, and its own
checkpoint format is not used: whole tensors are gathered and put back through its public access.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from disttrain.config import RunConfig
from disttrain.engine.average import WeightAverage
from disttrain.engine.checkpoint import SEPARATOR, Checkpoint, check_same_tensors
from disttrain.engine.deepspeed_settings import engine_settings
from disttrain.engine.distributed import Mesh
from disttrain.engine.optim import make_optimizer
from disttrain.engine.placement import Outcome, WholeState, whole_copies
from disttrain.methods.base import Method, all_parameters
from disttrain.methods.objective import Denoiser
from disttrain.models.base import BaseModel

MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedZero:
    """UNet and text encoder in one DeepSpeed engine."""

    average: WeightAverage | None = None

    def __init__(self, config: RunConfig, mesh: Mesh, base: BaseModel, method: Method) -> None:
        self.mesh, self.base = mesh, base
        deepspeed = load_deepspeed(mesh.device)
        groups = method.groups()
        self.parameters: dict[str, Tensor] = {**all_parameters(groups)}
        half = config.mixed_precision == "bf16"
        exact = {name: v.detach().clone() for name, v in self.parameters.items()} if half else {}
        denoiser = Denoiser.over(base, method.trains_text).to(mesh.device)
        optimizer = make_optimizer(config, groups)
        mesh.need_group()
        with quiet_deepspeed():
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=denoiser,
                optimizer=optimizer,
                config=engine_settings(config, mesh.strategy),
                dist_init_required=False,
            )
        mesh.watch(denoiser)
        self._access = _Stage3(mesh) if mesh.strategy == "zero3" else _Stages1And2()
        self._access.begin(self.optimizer)
        if exact:
            # DeepSpeed rounds the weights first and then copies them into float32, where a step
            # smaller than half of what bfloat16 resolves would round back to where it was.
            for name, parameter in self.parameters.items():
                self._access.put(parameter, exact[name], "")
            self._access.refresh(self.optimizer)

    @property
    def denoiser(self) -> nn.Module:
        """DeepSpeed's engine."""
        return self.engine

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Tell the engine whether gradients are complete after this micro-batch."""
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """The engine divides by the micro-batches itself."""
        self.engine.backward(loss)

    def step(self, finite: Sequence[bool], limits: Sequence[float]) -> Outcome:
        """The engine clips, and passes over a step whose gradient is not finite."""
        if not all(finite):
            return Outcome([float("nan")], [0])
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        return Outcome([norm], [] if self.engine.was_step_applied() else [0])

    def gather(self) -> WholeState:
        """Tensor by tensor, so that a rank never holds more than one beside its own."""
        from deepspeed.utils import safe_get_full_optimizer_state

        optimizer: dict[str, Tensor] = {}
        steps = max(float(state["step"]) for state in self.optimizer.optimizer.state.values())
        for name, parameter in self.parameters.items():
            for key in MOMENTS:
                full = safe_get_full_optimizer_state(parameter, key)
                self._keep(optimizer, f"{name}{SEPARATOR}{key}", full)
            self._keep(optimizer, f"{name}{SEPARATOR}step", torch.tensor(steps))
        return WholeState(self._trainables(), optimizer, {})

    def _trainables(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        found: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            self._keep(found, name, safe_get_full_fp32_param(parameter))
        return found

    def _keep(self, found: dict[str, Tensor], name: str, value: Tensor | None) -> None:
        assert value is not None, f"DeepSpeed does not know {name}"
        if self.mesh.is_main:
            found[name] = value.detach().to("cpu", copy=True)

    def restore(self, state: Checkpoint, place: str) -> None:
        """Each rank takes its part of every tensor."""
        shapes = {name: _whole_shape(value) for name, value in self.parameters.items()}
        check_same_tensors(shapes, state.trainables, place)
        steps = [
            float(value)
            for name, value in state.optimizer.items()
            if name.endswith(f"{SEPARATOR}step")
        ]
        for values in self.optimizer.optimizer.state.values():
            values["step"].fill_(max(steps, default=0.0))
        for name, parameter in self.parameters.items():
            self._access.put(parameter, state.trainables[name], "")
            for key in MOMENTS:
                saved = state.optimizer.get(f"{name}{SEPARATOR}{key}")
                if saved is not None:
                    self._access.put(parameter, saved, key)
        self._access.refresh(self.optimizer)

    def whole(self) -> AbstractContextManager[None]:
        """Plain copies on rank zero, from gathered weights."""
        return whole_copies(self.base, self._trainables())

    def close(self) -> None:
        """DeepSpeed's hooks hold engine and optimizer beyond the pack that made them, by ways that
        Python's collector cannot see: so they are emptied."""
        self.engine.destroy()
        for parameter in self.parameters.values():
            parameter.data = torch.empty(0)
            if hasattr(parameter, "ds_tensor"):
                vars(parameter)["ds_tensor"].data = torch.empty(0)
        vars(self.optimizer).clear()
        vars(self.engine).clear()


class _Stages1And2:
    """Setting what stages 1 and 2 hold; DeepSpeed itself does it from its own checkpoints only."""

    def begin(self, optimizer: Any) -> None:
        """Make the optimizer's state, of which DeepSpeed else loses sight in all parts but the
        first."""
        for part in optimizer.single_partition_of_fp32_groups:
            optimizer.optimizer.state[part] = _blank_state(part)
        optimizer._lazy_init_hp_params_optimizer_state()

    def put(self, parameter: Any, whole: Tensor, key: str) -> None:
        """Set a weight (no key) or a moment from its whole tensor."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        value = whole.to(parameter.device)
        if key:
            safe_set_full_optimizer_state(parameter, value, key)
        else:
            safe_set_full_fp32_param(parameter, value)

    def refresh(self, optimizer: Any) -> None:
        """Make the weights that compute those that were set."""
        optimizer.update_lp_params()


class _Stage3:
    """Setting what stage 3 holds: its own way to set whole tensors fails where a tensor's size is
    not a multiple of the ranks."""

    def __init__(self, mesh: Mesh) -> None:
        self.rank, self.world = mesh.rank, mesh.world

    def begin(self, optimizer: Any) -> None:
        """Make the optimizer's state, which torch makes at the first step."""
        for part in optimizer.fp32_partitioned_groups_flat:
            optimizer.optimizer.state[part] = _blank_state(part)

    def put(self, parameter: Any, whole: Tensor, key: str) -> None:
        """Set this rank's part of a weight (no key) or of a moment."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size = parameter.ds_tensor.numel()
        padded = torch.zeros(size * self.world)
        padded[: whole.numel()] = whole.flatten()
        own = padded[size * self.rank : size * (self.rank + 1)].to(parameter.ds_tensor.device)
        if key:
            safe_set_local_optimizer_state(parameter, own, key)
        else:
            safe_set_local_fp32_param(parameter, own)

    def refresh(self, optimizer: Any) -> None:
        """Make the weights that compute those that were set."""
        for i in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(i)


def _blank_state(part: Tensor) -> dict[str, Tensor]:
    moments = {key: torch.zeros_like(part) for key in MOMENTS}
    return {"step": torch.tensor(0.0), **moments}


def _whole_shape(parameter: Tensor) -> torch.Size:
    """Shape of a tensor, which under stage 3 is empty in between."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def load_deepspeed(device: torch.device) -> Any:
    """The package, without what it does on import that a processor does not need."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed calls two collectives by names that torch is about to change.
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    with quiet_deepspeed():
        import deepspeed
    if device.type == "cpu":
        # Its shared-memory collectives take a minute to compile; gloo does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextmanager
def quiet_deepspeed() -> Iterator[None]:
    """A context without notes about DeepSpeed's own inner workings."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
