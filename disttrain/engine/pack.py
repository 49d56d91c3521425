"""A pack in training: the subjects that share one process's step, with all that changes.

Invariant: what a step changes of a subject is in `state_of` it and depends on that subject alone,
so one that was saved, moved to another pack or another slot goes on exactly as if nothing had been.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from disttrain.config import RunConfig
from disttrain.engine.checkpoint import SEPARATOR, Checkpoint
from disttrain.engine.distributed import Mesh
from disttrain.engine.history import History
from disttrain.engine.optim import (
    PackedAdamW,
    learning_rate_factor,
    schedule_factor,
    set_rates,
)
from disttrain.engine.placement import Outcome
from disttrain.engine.settings_keys import training_key
from disttrain.engine.slot import Slot
from disttrain.engine.strategy import place_weights
from disttrain.errors import CheckpointError
from disttrain.methods import METHODS
from disttrain.methods.base import Method
from disttrain.methods.batch import Batcher
from disttrain.models.base import BaseModel
from disttrain.models.packed import placed
from disttrain.models.text import ContextCache


class Pack:
    """Subjects that train together, their method and optimizer.

    Args:
        config: what they share.
        base: freshly loaded; the method takes it apart.
        slots: at their start; `arrange` puts others, or these from their checkpoints, in place.
    """

    def __init__(
        self, config: RunConfig, mesh: Mesh, base: BaseModel, slots: Sequence[Slot]
    ) -> None:
        self.config, self.mesh, self.base = config, mesh, base
        self.slots = list(slots)
        dtype = mesh.weight_dtype if config.packable else torch.float32
        placed(base.unet, mesh.device, dtype)
        placed(base.text_encoder, mesh.device, dtype)
        kind: type[Method] = METHODS[config.method.name]
        self.method = kind(base, [slot.config for slot in slots])
        if config.train.gradient_checkpointing:
            # Inactive in evaluation mode; neither model has dropout, so nothing else changes. The
            # reentrant kind loses gradients where a layer's input needs none.
            base.unet.enable_gradient_checkpointing()
            base.unet.train()
            base.text_encoder.gradient_checkpointing_enable({"use_reentrant": False})
            base.text_encoder.train(self.method.trains_text)
        self.placement = place_weights(config, mesh, base, self.method)
        self.contexts = ContextCache(self.method.tokenizer, base.text_encoder)
        self.batcher: Batcher | None = None
        self.factor = learning_rate_factor(
            config.optim.scale_lr,
            mesh.world,
            config.data.batch_size,
            config.train.gradient_accumulation_steps,
        )

    @property
    def denoiser(self) -> nn.Module:
        """The module that trains, as it is called."""
        return self.placement.denoiser

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The trainable tensors, or this rank's parts of them."""
        return self.placement.parameters

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What changes them."""
        return self.placement.optimizer

    @property
    def active(self) -> list[Slot]:
        """The subjects that still have steps to take."""
        return [slot for slot in self.slots if not slot.idle]

    @property
    def names(self) -> list[str]:
        """The subjects by slot."""
        return [slot.name for slot in self.slots]

    @property
    def samples_per_step(self) -> int:
        """Pictures of one subject per update, over all processes (class pictures not counted)."""
        size = self.config.data.batch_size * self.config.train.gradient_accumulation_steps
        return size * self.mesh.world

    def feed(self, batcher: Batcher) -> None:
        """Connect the data of the slots."""
        if self.batcher is not None:
            self.batcher.loader.close()
        self.batcher = batcher

    @contextmanager
    def feeding(self) -> Iterator[None]:
        """The data may be asked for inside. At the end the processes that read ahead are ended and
        the pack takes no more steps."""
        try:
            yield
        finally:
            if self.batcher is not None:
                self.batcher.loader.close()
            self.placement.close()

    def whole(self) -> AbstractContextManager[None]:
        """Inside, rank zero has complete weights to draw with and to write, of the average if there
        is one. Every rank enters; no step may be taken inside."""
        return self.placement.whole()

    def begin_step(self) -> None:
        """Set the learning rates of the coming update; idle subjects stay as they are."""
        factors = [
            0.0
            if slot.idle
            else self.factor
            * schedule_factor(slot.config.optim, slot.step, slot.config.train.max_steps)
            for slot in self.slots
        ]
        set_rates(self.optimizer, [slot.config for slot in self.slots], factors)

    def rate_of(self, slot: int) -> float:
        """Learning rate of a slot's first part in the update that was begun last."""
        rate = self.optimizer.param_groups[0]["lr"]
        return float(rate[slot] if isinstance(rate, Tensor) else rate)

    def losses(self, micro: int) -> Tensor:
        """Losses `[S]` of one micro-batch of this rank, with their graph."""
        assert self.batcher is not None, "feed() comes first"
        cursors = tuple(slot.cursor for slot in self.slots)
        return self.denoiser(self.batcher.batch(cursors, micro))

    def update(self, losses: list[float]) -> Outcome:
        """Apply the gradients of those whose loss and gradient are finite; the others stay as they
        are, uncounted. Without a subject axis all stay.

        Args:
            losses: mean over all ranks and micro-batches, so every rank decides alike.
        """
        finite = torch.tensor(losses).isfinite().tolist()
        limits = [slot.config.optim.max_grad_norm for slot in self.slots]
        outcome = self.placement.step(finite, limits)
        for i, slot in enumerate(self.slots):
            if i not in outcome.failed:
                slot.step += not slot.idle
                slot.cursor += self.samples_per_step
                slot.history.add_loss(losses[i])
        average = self.placement.average
        if average is not None:
            average.update([slot.step for slot in self.slots])
        return outcome

    def describe_failure(self, index: int) -> str:
        """What to tell of a slot whose last update was held back."""
        slot = self.slots[index]
        return (
            f"loss or gradient of {slot.name} is not finite at step {slot.step + 1} (samples "
            f"{slot.cursor} to {slot.cursor + self.samples_per_step - 1}); its weights are those "
            f"of step {slot.step}"
        )

    def state_of(self, index: int) -> Checkpoint:
        """All of a subject that a step changes; tensors keep an axis of one subject."""
        slot = self.slots[index]
        state: dict[str, Any] = {
            "step": slot.step,
            "cursor": slot.cursor,
            "subject": slot.name,
            "source": slot.source,
            "settings": training_key(slot.config),
            "world_size": self.mesh.world,
        }
        if self.mesh.scaler is not None:
            state["scaler"] = self.mesh.scaler.state_dict()
        if slot.config.train.early_stop:
            state["scored"] = slot.history.saved()
        whole = self.placement.gather()
        parts = (whole.trainables, whole.optimizer, whole.average)
        return Checkpoint(state, *(self._slice(tensors, index) for tensors in parts))

    def _slice(self, tensors: dict[str, Tensor], index: int) -> dict[str, Tensor]:
        if not self.config.packable:
            return dict(tensors)
        # Copies: aligned in memory, and what they were when the pack goes on.
        return {name: value[index : index + 1].clone() for name, value in tensors.items()}

    def arrange(self, slots: Sequence[Slot], found: Sequence[Checkpoint | None]) -> None:
        """Fill the slots with these subjects, each from its state or, for None, from its start."""
        self.slots = list(slots)
        if self.config.packable:
            self._stack(found)
        elif found[0] is not None:
            self.placement.restore(found[0], self.slots[0].name)
        self.method.arrange([slot.config for slot in slots])
        for slot, state in zip(slots, found, strict=True):
            if state is not None:
                slot.step, slot.cursor = state.state["step"], state.state["cursor"]
                if slot.config.train.early_stop:
                    scored = state.state.get("scored")
                    slot.history = History.restored(scored, slot.history.yardstick)
                if self.mesh.scaler is not None and "scaler" in state.state:
                    self.mesh.scaler.load_state_dict(state.state["scaler"])

    def put_back(self, slot: Slot, state: Checkpoint) -> None:
        """Give a subject the weights it had in a state, to draw and write with; no step of it may
        follow."""
        if not self.config.packable:
            self.placement.restore(state, slot.name)
            return
        index = self.slots.index(slot)
        average = self.placement.average
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter[index : index + 1] = state.trainables[name]
                if average is not None:
                    average.values[name][index : index + 1] = state.average[name]

    def _stack(self, found: Sequence[Checkpoint | None]) -> None:
        """Put the tensors of the slots together along the subject axis."""
        fresh = [
            self.method.initial(slot.config) if state is None else {}
            for slot, state in zip(self.slots, found, strict=True)
        ]
        for name, parameter in self.parameters.items():
            parts = [
                start[name] if state is None else state.trainables[name]
                for start, state in zip(fresh, found, strict=True)
            ]
            stacked = torch.cat([part.to(parameter.device) for part in parts])
            parameter.grad = None
            parameter.data = stacked.to(parameter.dtype)
            blank = PackedAdamW.blank(parameter)
            for i, state in enumerate(found):
                for key, value in blank.items():
                    saved = (
                        None if state is None else state.optimizer.get(f"{name}{SEPARATOR}{key}")
                    )
                    if saved is not None:
                        value[i : i + 1] = saved.to(value.device)
            self.optimizer.state[parameter] = blank
            average = self.placement.average
            if average is not None:
                averages = [
                    part if state is None else state.average[name]
                    for part, state in zip(parts, found, strict=True)
                ]
                average.values[name] = torch.cat([a.to(parameter.device) for a in averages])


def refuse_other(slot: Slot, state: Checkpoint, advice: str) -> None:
    """CheckpointError unless a slot may go on from a state: same pictures, same settings."""
    for what, saved, now in [
        ("pictures", state.state["source"], slot.source),
        ("settings", state.state["settings"], training_key(slot.config)),
    ]:
        if saved != now:
            raise CheckpointError(
                f"{slot.name}: its {what} changed since its checkpoint was written; "
                f"put them back, or {advice}"
            )
