"""The order of pictures of several sizes: every optimizer step holds pictures of one bucket.

Beside `order.py`, whose order of single samples it groups. Invariant: as there, the sample at a
position is a function of the plan alone; an epoch holds every sample at least once (wrap), and
twice only those that fill up the last step of their bucket.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from disttrain.data.order import KEPT, SampleOrder


@dataclass(frozen=True)
class _Epoch:
    """Steps of one epoch in their order: bucket and number within the bucket of each."""

    members: list[np.ndarray]
    """Samples of each bucket in the epoch's order."""
    buckets: np.ndarray
    numbers: np.ndarray


class BucketOrder:
    """Groups the samples of each epoch into steps of `step_size` samples from one bucket.

    The samples of an epoch are taken in the order of `order`; whenever a bucket has enough for a
    step, the step is next. So reads stay as near to each other as the order has them. What remains
    in a bucket is filled up with the bucket's first samples of the epoch.

    Args:
        order: of the samples without buckets, with nothing dropped.
        buckets: int `[size]`, the bucket of each sample.
        step_size: samples of one optimizer step over all processes.
        drop: leave out what does not fill a step, unless it is all that its bucket has.

    Memory: two epochs at 16 bytes a sample.
    """

    def __init__(
        self, order: SampleOrder, buckets: np.ndarray, step_size: int, drop: bool = False
    ) -> None:
        assert order.length == order.size == len(buckets)
        assert step_size > 0
        self.order, self._buckets, self.step_size, self.drop = order, buckets, step_size, drop
        self.counts = np.bincount(buckets)
        self._steps = [self._steps_of(int(count)) for count in self.counts]
        self.length = sum(self._steps) * step_size
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    def _steps_of(self, count: int) -> int:
        if self.drop and count >= self.step_size:
            return count // self.step_size
        return -(-count // self.step_size)

    @property
    def repeated(self) -> int:
        """Positions of an epoch that repeat a sample, to fill up a step."""
        pairs = zip(self._steps, self.counts.tolist(), strict=True)
        return sum(max(0, steps * self.step_size - count) for steps, count in pairs)

    def epoch_of(self, position: int) -> int:
        """How many epochs lie before `position`."""
        assert position >= 0
        return position // self.length

    def sample_at(self, position: int, tries: int = 0) -> int:
        """Number of the sample at `position`, or of the one `tries` places on in its bucket."""
        epoch, step, place = self._find(position)
        members = epoch.members[epoch.buckets[step]]
        return int(members[(epoch.numbers[step] * self.step_size + place + tries) % len(members)])

    def bucket_at(self, position: int) -> int:
        """The bucket of the step that holds `position`."""
        epoch, step, _ = self._find(position)
        return int(epoch.buckets[step])

    def _find(self, position: int) -> tuple[_Epoch, int, int]:
        assert position >= 0
        number, place = divmod(position, self.length)
        if number not in self._epochs:
            self._epochs[number] = self._plan(number)
            if len(self._epochs) > KEPT:
                self._epochs.popitem(last=False)
        return self._epochs[number], *divmod(place, self.step_size)

    def _plan(self, number: int) -> _Epoch:
        line = self.order.epoch(number)
        of_line = self._buckets[line]
        # Stable, so that each bucket's places stay in the order of the line.
        by_bucket = np.split(np.argsort(of_line, kind="stable"), np.cumsum(self.counts)[:-1])
        buckets, numbers, complete = [], [], []
        for bucket, places in enumerate(by_bucket):
            steps = np.arange(self._steps[bucket])
            last = np.minimum((steps + 1) * self.step_size, len(places)) - 1
            buckets.append(np.full(len(steps), bucket))
            numbers.append(steps)
            complete.append(places[last] if len(steps) else steps)
        order = np.argsort(np.concatenate(complete), kind="stable")
        members = [line[places] for places in by_bucket]
        return _Epoch(members, np.concatenate(buckets)[order], np.concatenate(numbers)[order])
