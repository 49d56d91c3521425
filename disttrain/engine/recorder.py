"""What one pack's steps leave behind: metrics, tracker values, the progress line.

Invariant: all of it happens on rank zero; `record` performs no collective.
"""

from __future__ import annotations

import gc
from collections import deque
from statistics import median
from types import TracebackType

from disttrain.engine.metrics import StepRecord
from disttrain.engine.pack import Pack
from disttrain.engine.placement import Outcome
from disttrain.engine.progress import plain_duration
from disttrain.engine.work import Work

COLLECT_GARBAGE_EVERY = 100


class Recorder:
    """Context of one pack's training."""

    def __init__(self, run: Work, pack: Pack) -> None:
        self.run, self.pack = run, pack
        self.updates = 0
        self.total = max(slot.config.train.max_steps for slot in pack.slots)
        self.seconds: deque[float] = deque(maxlen=50)
        label = pack.names[0] if len(pack.names) == 1 else f"{len(pack.names)} subjects"
        self.label = f"{run.config.method.name} {label}"

    def __enter__(self) -> Recorder:
        # Python's collector pauses each rank at its own moment, and all wait for the slowest: it
        # runs at the same steps on every rank instead.
        gc.disable()
        self.run.bar.start(self.label, self.total, self._step())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        gc.enable()
        self.run.bar.stop()

    def _step(self) -> int:
        """How far the subject is that has most to do."""
        return min((slot.step for slot in self.pack.active), default=self.total)

    def record(self, losses: list[float], outcome: Outcome, seconds: float) -> None:
        """One update: losses and outcome by slot, its wall time in seconds."""
        pack = self.pack
        self.updates += 1
        if self.updates % COLLECT_GARBAGE_EVERY == 0:
            gc.collect()
        if not self.run.mesh.is_main:
            return
        self.seconds.append(seconds)
        counted = [
            i for i, slot in enumerate(pack.slots) if not slot.idle and i not in outcome.failed
        ]
        images = pack.samples_per_step * len(pack.active) / seconds
        self.run.log(
            [self._record(i, losses[i], outcome.norms[i], images, seconds) for i in counted]
        )
        if not counted:
            return
        mean = sum(losses[i] for i in counted) / len(counted)
        usual, step = median(self.seconds), self._step()
        left = plain_duration(usual * (self.total - step))
        speed = pack.samples_per_step * len(pack.active) / usual
        rate = pack.rate_of(counted[0])
        detail = f"loss {mean:.4f}  lr {rate:.3g}  {speed:.1f} images/s"
        self.run.bar.advance(step, self.total, self.label, detail, f"{left} left")

    def _record(
        self, i: int, loss: float, norm: float, images: float, seconds: float
    ) -> StepRecord:
        pack, slot = self.pack, self.pack.slots[i]
        stream = slot.streams.instance
        per_epoch = max(1, stream.order.length // pack.samples_per_step)
        return StepRecord(
            step=slot.step,
            subject=slot.name,
            loss=loss,
            learning_rate=pack.rate_of(i),
            gradient_norm=norm,
            epoch=stream.epoch_of(slot.cursor - pack.samples_per_step),
            epoch_step=(slot.step - 1) % per_epoch,
            images_per_second=images,
            seconds=seconds,
        )
