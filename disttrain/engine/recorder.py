"""What one pack's steps leave behind: metrics, tracker values, the progress line.

Invariant: all of it happens on rank zero; `record` performs no collective.
"""

from __future__ import annotations

import gc
from collections import deque
from statistics import median
from types import TracebackType

from disttrain.engine.metrics import StepRecord, tracker_values
from disttrain.engine.pack import Pack
from disttrain.engine.progress import plain_duration
from disttrain.engine.run import Run

COLLECT_GARBAGE_EVERY = 100


class Recorder:
    """Context of one pack's training."""

    def __init__(self, run: Run, pack: Pack) -> None:
        self.run, self.pack = run, pack
        self.total = run.config.train.max_steps
        self.seconds: deque[float] = deque(maxlen=50)
        label = pack.names[0] if len(pack.names) == 1 else f"{len(pack.names)} subjects"
        self.label = f"{run.config.method.name} {label}"

    def __enter__(self) -> Recorder:
        # Python's collector pauses each rank at its own moment, and all wait for the slowest: it
        # runs at the same steps on every rank instead.
        gc.disable()
        self.run.progress.start(self.label, self.total, self.pack.step)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        gc.enable()
        self.run.progress.stop()

    def record(self, losses: list[float], norms: list[float], seconds: float) -> None:
        """One finished update: `losses` and `norms` by slot, its wall time in seconds."""
        pack = self.pack
        if pack.step % COLLECT_GARBAGE_EVERY == 0:
            gc.collect()
        if not self.run.mesh.is_main:
            return
        self.seconds.append(seconds)
        images = pack.samples_per_step * len(pack.names) / seconds
        rate = pack.optimizer.param_groups[0]["lr"]
        records = [
            self._record(slot, losses[slot], norms[slot], rate, images, seconds)
            for slot in range(len(pack.names))
        ]
        self.run.metrics.append(records)
        self.run.track(tracker_values(records), pack.step)
        mean = sum(losses) / len(losses)
        usual = median(self.seconds)
        left = plain_duration(usual * (self.total - pack.step))
        speed = pack.samples_per_step * len(pack.names) / usual
        detail = f"loss {mean:.4f}  lr {rate:.3g}  {speed:.1f} images/s"
        self.run.progress.advance(pack.step, self.total, self.label, detail, f"{left} left")

    def _record(
        self, slot: int, loss: float, norm: float, rate: float, images: float, seconds: float
    ) -> StepRecord:
        pack = self.pack
        assert pack.batcher is not None
        stream = pack.batcher.subjects[slot].instance
        first = pack.cursor - pack.samples_per_step
        per_epoch = max(1, stream.order.length // pack.samples_per_step)
        return StepRecord(
            step=pack.step,
            subject=pack.names[slot],
            loss=loss,
            learning_rate=rate,
            gradient_norm=norm,
            epoch=stream.epoch_of(first),
            epoch_step=(pack.step - 1) % per_epoch,
            images_per_second=images,
            seconds=seconds,
        )
