"""A pack in training: the subjects that share one process's step, with all that changes.

Invariant: everything that a step changes is in `state()`, so a pack restored from it goes on
exactly as if it had not stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from disttrain.config import RunConfig, SubjectSettings
from disttrain.engine.average import WeightAverage
from disttrain.engine.checkpoint import (
    Checkpoint,
    optimizer_tensors,
    restore_optimizer,
    restore_parameters,
)
from disttrain.engine.distributed import Mesh
from disttrain.engine.optim import (
    clip_gradients,
    gradient_norms,
    learning_rate_factor,
    make_optimizer,
    schedule_factor,
    set_learning_rates,
)
from disttrain.errors import CheckpointError, TrainingFailed
from disttrain.methods import METHODS
from disttrain.methods.base import Method, all_parameters
from disttrain.methods.batch import Batcher
from disttrain.methods.objective import Denoiser
from disttrain.models.base import BaseModel
from disttrain.models.packed import placed
from disttrain.models.text import ContextCache


class Pack:
    """Subjects that train together, their method, optimizer and place in the data.

    Args:
        base: freshly loaded; the method takes it apart.
    """

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        base: BaseModel,
        subjects: Sequence[SubjectSettings],
    ) -> None:
        self.config, self.mesh, self.base, self.subjects = config, mesh, base, subjects
        self.names = [subject.name for subject in subjects]
        dtype = mesh.weight_dtype if config.packable else torch.float32
        placed(base.unet, mesh.device, dtype)
        placed(base.text_encoder, mesh.device, dtype)
        self.method: Method = METHODS[config.method.name](base, config, subjects)
        groups = self.method.groups()
        self.parameters: dict[str, Tensor] = {**all_parameters(groups)}
        self.parameter_names = {value: name for name, value in self.parameters.items()}
        decay = config.optim.ema_decay
        self.average = WeightAverage(self.parameters, decay) if decay else None
        if config.train.gradient_checkpointing:
            # Inactive in evaluation mode; neither model has dropout, so nothing else changes. The
            # reentrant kind loses gradients where a layer's input needs none.
            base.unet.enable_gradient_checkpointing()
            base.unet.train()
            base.text_encoder.gradient_checkpointing_enable({"use_reentrant": False})
            base.text_encoder.train(self.method.trains_text)
        text_encoder = base.text_encoder if self.method.trains_text else None
        denoiser = Denoiser(base.unet, text_encoder, base.scheduler).to(mesh.device)
        self.denoiser, self.optimizer = mesh.prepare(denoiser, make_optimizer(config, groups))
        self.contexts = ContextCache(self.method.tokenizer, base.text_encoder)
        self.batcher: Batcher | None = None
        self.sources: dict[str, str] = {}
        self.step = 0
        self.cursor = 0
        self.factor = learning_rate_factor(
            config.optim.scale_lr,
            mesh.world,
            config.data.batch_size,
            config.train.gradient_accumulation_steps,
        )

    @property
    def samples_per_step(self) -> int:
        """Pictures of one subject per update, over all processes (class pictures not counted)."""
        size = self.config.data.batch_size * self.config.train.gradient_accumulation_steps
        return size * self.mesh.world

    def feed(self, batcher: Batcher, sources: dict[str, str]) -> None:
        """Connect the data: batches, and the digest of each subject's pictures."""
        self.batcher, self.sources = batcher, sources

    @contextmanager
    def feeding(self) -> Iterator[None]:
        """The data may be asked for inside; at the end the processes that read ahead are ended."""
        assert self.batcher is not None, "feed() comes first"
        try:
            yield
        finally:
            self.batcher.loader.close()

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the weights are those that results are made from: the average, if there is one.

        No step may be taken inside.
        """
        return nullcontext() if self.average is None else self.average.applied()

    def begin_step(self) -> None:
        """Set the learning rate of the coming update."""
        schedule = schedule_factor(self.config.optim, self.step, self.config.train.max_steps)
        set_learning_rates(self.optimizer, self.factor * schedule)

    def losses(self, micro: int) -> Tensor:
        """Losses `[S]` of one micro-batch of this rank, with their graph."""
        assert self.batcher is not None, "feed() comes first"
        return self.denoiser(self.batcher.batch(self.cursor, micro))

    def update(self, losses: list[float]) -> list[float]:
        """Apply the gradients; returns each subject's gradient norm before clipping.

        Args:
            losses: mean over all ranks and micro-batches, so every rank decides alike.

        Raises:
            TrainingFailed: a loss or gradient is not finite; no weight has changed.
        """
        self.mesh.unscale(self.optimizer)
        parameters = list(self.parameters.values())
        norms = gradient_norms(parameters, self.config.packable)
        values = norms.tolist()
        self._refuse_not_finite(losses, values)
        if self.config.optim.max_grad_norm:
            clip_gradients(parameters, norms, self.config.optim.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.cursor += self.samples_per_step
        if self.average is not None:
            self.average.update(self.step)
        return values

    def _refuse_not_finite(self, losses: list[float], norms: list[float]) -> None:
        finite = torch.tensor(losses).isfinite()
        if self.mesh.scaler is None:  # the fp16 scaler skips infinite gradients by itself
            finite &= torch.tensor(norms).isfinite()
        if not bool(finite.all()):
            bad = [n for n, good in zip(self.names, finite.tolist(), strict=True) if not good]
            last = self.cursor + self.samples_per_step - 1
            raise TrainingFailed(
                f"loss or gradient of {', '.join(bad)} is not finite at step {self.step + 1} "
                f"(samples {self.cursor} to {last}); the weights are those of step {self.step}. "
                "Look at the pictures and run again, or use --fresh with a lower learning rate"
            )

    def state(self) -> Checkpoint:
        """All that a step changes, for a checkpoint."""
        state: dict[str, Any] = {
            "step": self.step,
            "cursor": self.cursor,
            "subjects": self.names,
            "sources": self.sources,
            "world_size": self.mesh.world,
        }
        if self.mesh.scaler is not None:
            state["scaler"] = self.mesh.scaler.state_dict()
        optimizer = optimizer_tensors(self.optimizer, self.parameter_names)
        trainables = {name: value.detach() for name, value in self.parameters.items()}
        average = self.average.values if self.average is not None else {}
        return Checkpoint(state, trainables, optimizer, average)

    def restore(self, checkpoint: Checkpoint, path: str) -> None:
        """Take over a checkpoint's state.

        Raises:
            CheckpointError: it belongs to other pictures or other tensors.
        """
        for name, digest in checkpoint.state["sources"].items():
            if self.sources.get(name) != digest:
                raise CheckpointError(
                    f"{path}: the pictures of {name} changed since it was written; "
                    "put them back, or use --fresh"
                )
        restore_parameters(self.parameters, checkpoint.trainables, path)
        restore_optimizer(self.optimizer, self.parameter_names, checkpoint.optimizer)
        if self.average is not None:
            restore_parameters(self.average.values, checkpoint.average, path)
        if self.mesh.scaler is not None and "scaler" in checkpoint.state:
            self.mesh.scaler.load_state_dict(checkpoint.state["scaler"])
        self.step, self.cursor = checkpoint.state["step"], checkpoint.state["cursor"]
