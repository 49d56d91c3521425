"""The processes of a run: who they are, where they compute, and everything they tell each other.

The only module that starts Accelerate or performs a collective. Invariant: every rank calls every
method here in the same order; work for rank zero alone goes through `on_rank_zero`, which carries
its result or its error to all.
"""

from __future__ import annotations

import gc
import os
import warnings
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from traceback import clear_frames
from types import TracebackType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from disttrain.config import RunConfig
from disttrain.errors import ConfigError, DataError, UserError

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
LAUNCHER_NAMES = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
    *("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"),
}
Result = TypeVar("Result")


@dataclass(frozen=True)
class WorkerPlace:
    """Which of how many workers this process is."""

    number: int
    count: int


def leave_launcher() -> WorkerPlace:
    """Make this process a world of its own, whatever started it: torchrun, accelerate launch, an
    array job. Call before anything asks for a GPU.

    Workers of a fleet send each other nothing, so none waits for, or dies with, another. On a
    machine with several GPUs each takes the one of its local rank.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    task = int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))
    task -= int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
    tasks = int(os.environ.get("SLURM_ARRAY_TASK_COUNT", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    for name in list(os.environ):
        if name in LAUNCHER_NAMES or name.startswith("TORCHELASTIC_"):
            del os.environ[name]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else []
    if world > 1 and (devices or torch.cuda.device_count() > 1):
        devices = devices or [str(i) for i in range(torch.cuda.device_count())]
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[local % len(devices)]
    return WorkerPlace(task * world + rank, tasks * world)


class Mesh:
    """This process's place among the processes of a run.

    Args:
        config: mixed precision and accumulation go to Accelerate from here, so that no launcher
            file can contradict them; `launcher_settings.settle_parallel` has seen it.

    Attributes:
        strategy: how a model that trains whole is laid out; one rank has nothing to split.

    Raises:
        UserError: the world is not the one the launcher announced (Accelerate alone would make
            several worlds of one).
    """

    def __init__(self, config: RunConfig) -> None:
        on_cpu = not torch.cuda.is_available()
        if on_cpu and config.mixed_precision == "fp16":
            raise ConfigError("mixed_precision: fp16 needs a CUDA GPU and there is none; use bf16")
        for name in config.train.trackers:
            if find_spec(name) is None:
                raise ConfigError(
                    f"train.trackers: {name} is not installed; pip install 'disttrain[trackers]'"
                )
        strategy = config.parallel.strategy
        if strategy.startswith("zero") and find_spec("deepspeed") is None:
            raise ConfigError(
                f"parallel.strategy: {strategy} needs DeepSpeed, which is not installed; "
                "pip install 'disttrain[deepspeed]', or use fsdp"
            )
        if on_cpu:  # else DeepSpeed, which Accelerate imports, warns that it finds no GPU
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        self.accelerator = Accelerator(
            cpu=on_cpu,
            log_with=list(config.train.trackers) or None,
            project_dir=config.folder,
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.train.gradient_accumulation_steps,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT),
                DistributedDataParallelKwargs(broadcast_buffers=False),
            ],
            step_scheduler_with_optimizer=False,
        )
        self._prepared: list[weakref.ref[nn.Module]] = []
        self.rank = self.accelerator.process_index
        self.world = self.accelerator.num_processes
        self.device = self.accelerator.device
        _refuse_other_world(self.world)
        parallel = config.parallel
        alone = self.world == 1 and not parallel.offload_optimizer
        self.strategy = "ddp" if alone or parallel.strategy == "auto" else parallel.strategy

    @property
    def is_main(self) -> bool:
        """Whether this is rank zero, the only one that writes into the run folder."""
        return self.rank == 0

    @property
    def weight_dtype(self) -> torch.dtype:
        """Precision in which frozen weights are kept."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(
            self.accelerator.mixed_precision, torch.float32
        )

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Model and optimizer, wrapped for this world."""
        with warnings.catch_warnings():
            # Accelerate has no other name yet for the option that torch renamed.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            prepared = self.accelerator.prepare(model, optimizer)
        self.watch(prepared[0])
        return prepared

    def watch(self, module: nn.Module) -> None:
        """Remember a module that talks to other ranks by itself: it must go before their group."""
        self._prepared.append(weakref.ref(module))

    def need_group(self) -> None:
        """Make a process group of one where no launcher made one, as DeepSpeed wants it."""
        os.environ.setdefault("LOCAL_RANK", "0")
        if not torch.distributed.is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            store = HashStore()
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)

    def device_mesh(self) -> DeviceMesh:
        """All ranks in one row, over which tensors are split."""
        return init_device_mesh(self.device.type, (self.world,))

    def set_accumulation(self, steps: int) -> None:
        """How many micro-batches make an update, once the batch has been settled."""
        self.accelerator.gradient_accumulation_steps = steps

    def accumulate(self, model: nn.Module) -> AbstractContextManager[None]:
        """Context of one micro-batch: gradients travel only on the last of an update."""
        return self.accelerator.accumulate(model)

    def backward(self, loss: Tensor) -> None:
        """Gradients of one micro-batch, divided by the accumulation steps, scaled under fp16."""
        self.accelerator.backward(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Undo fp16's loss scale before gradients are measured."""
        self.accelerator.unscale_gradients(optimizer)

    def autocast(self) -> AbstractContextManager[None]:
        """The run's mixed precision, for forward passes outside the prepared module."""
        return self.accelerator.autocast()

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The fp16 loss scaler, where there is one."""
        return self.accelerator.scaler

    def mean(self, values: Tensor) -> Tensor:
        """Mean over ranks of a tensor of the same shape on each."""
        return self.accelerator.reduce(values, reduction="mean")  # type: ignore[return-value]

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks of a tensor of the same shape on each."""
        return self.accelerator.reduce(values, reduction="sum")  # type: ignore[return-value]

    def gather(self, value: Result) -> list[Result]:
        """The value of every rank, in order; it travels by pickle. Not to wait for slow work."""
        return gather_object([value])

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.accelerator.wait_for_everyone()

    def on_rank_zero(self, action: Callable[[], Result]) -> Result:
        """Do something on rank zero and give its result, or its error, to every rank.

        The result travels by pickle between the processes of one run.
        """
        outcome: list[object] = [None, None]
        if self.is_main:
            try:
                outcome[0] = action()
            except UserError as error:
                outcome[1] = error
            except OSError as error:
                outcome[1] = DataError(f"{error.filename or 'run folder'}: {error.strerror}")
        broadcast_object_list(outcome)
        if isinstance(outcome[1], UserError):
            raise outcome[1]
        return outcome[0]  # type: ignore[return-value]

    def alike(self, action: Callable[[], Result]) -> Result:
        """Do something on every rank; if it failed on one, raise that error on all of them.

        Raises:
            UserError: of the first rank on which it failed.
        """
        result: list[Result] = []
        failed: UserError | None = None
        try:
            result.append(action())
        except UserError as error:
            failed = error
        for error in self.gather(failed):
            if error is not None:
                raise error
        return result[0]

    def start_trackers(self, name: str, folder: Path, settings: dict[str, Any]) -> None:
        """Begin logging to the trackers the config asks for; their files go into the run folder."""
        self.accelerator.project_configuration.set_directories(str(folder))
        self.accelerator.init_trackers(name, config=settings)

    def __enter__(self) -> Mesh:
        return self

    def release(self) -> None:
        """Let go of everything prepared so far; the caller has dropped it too."""
        self.accelerator.free_memory()
        gc.collect()
        self._prepared = [alive for alive in self._prepared if alive() is not None]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # The frames of an error hold the model. If gloo's group is destroyed before the model that
        # uses it, torch waits for gloo's threads while holding the lock that those wait for.
        clear_frames(trace)
        self.release()
        if self._prepared:
            for tracker in self.accelerator.trackers:
                tracker.finish()
        else:
            self.accelerator.end_training()


def _refuse_other_world(world: int) -> None:
    """Each process of a failed launch believes to be alone; it would train, and write, for itself.

    torchrun and accelerate's multi-process launcher set WORLD_SIZE. `accelerate launch --cpu` (or a
    config with `use_cpu`) starts a single process whatever --num_processes says, and gives itself
    away by the rendezvous address it sets for the others.
    """
    announced = int(os.environ.get("WORLD_SIZE", "1"))
    if announced != world:
        raise UserError(
            f"the launcher announced {announced} processes but this one sees {world}; "
            "start with torchrun or accelerate launch, one launcher per node"
        )
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    if "WORLD_SIZE" not in os.environ and by_accelerate and "MASTER_ADDR" in os.environ:
        raise UserError(
            "accelerate launch was asked for several processes and started one; "
            "use --multi_gpu instead of --cpu (also without GPUs), or torchrun"
        )
