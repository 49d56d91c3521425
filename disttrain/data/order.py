"""Which sample comes when: a plan that can be asked at any position, not a stream.

Between the sources and the loader. Invariant: the sample at a position is a function of (sizes,
seed, subject, stream, window, position) alone, and each epoch holds every sample exactly once. So
any rank, worker or restarted run that asks for a position gets the same answer, and the state of
the order is the position. (`bucket_order.py` says what an epoch is when pictures differ in size.)
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from disttrain import randomness

KEPT = 2  # an epoch's end and the next one's start are asked for in turns by a batch across both
LARGE_SET = 10_000
"""From so many samples on, `auto` drops the tail of an epoch: leaving out less than one optimizer
step's worth is then nothing, and no step mixes two epochs."""


class Order(Protocol):
    """An endless order of samples by position."""

    length: int
    """Positions of an epoch."""

    def epoch_of(self, position: int) -> int:
        """How many epochs lie before `position`."""
        ...

    def sample_at(self, position: int, tries: int = 0) -> int:
        """Number of the sample at `position`, which counts on over all epochs.

        Args:
            tries: how many samples turned out to be damaged there; each asks for the next one.
        """
        ...

    def bucket_at(self, position: int) -> int:
        """Number of the bucket whose size the sample at `position` has."""
        ...


class SampleOrder:
    """Endless order of the samples 0 ... size - 1, shuffled anew in each epoch.

    Without a window an epoch is one uniform permutation. With a window an epoch first shuffles the
    shards, lays their samples end to end, cuts that line into pieces of `window` samples (at places
    that differ between epochs) and shuffles within each piece: reads then stay within the few
    shards that a piece touches.

    Args:
        sizes: number of samples, or the number in each shard in the order of the index.
        seed, subject, stream: what the order is drawn from.
        window: samples of a piece; None for the whole epoch.
        whole: drop the tail of each epoch that does not fill so many positions; a set smaller than
            that keeps all. Which samples are dropped differs from epoch to epoch.

    Memory: the permutation of at most two pieces (8 bytes a sample) and of the shards.
    """

    def __init__(
        self,
        sizes: int | Sequence[int],
        seed: int,
        subject: str,
        stream: str = "order",
        window: int | None = None,
        whole: int = 1,
    ) -> None:
        shard_sizes = np.array([sizes] if isinstance(sizes, int) else sizes, dtype=np.int64)
        assert len(shard_sizes) > 0
        assert shard_sizes.min() >= 0
        self.size = int(shard_sizes.sum())
        assert self.size > 0, "an order needs at least one sample"
        assert window is None or window > 0
        assert whole > 0
        self.length = self.size // whole * whole or self.size
        self.window = self.size if window is None else min(window, self.size)
        self._seed, self._stream = seed, (subject, stream)
        self._shard_sizes = shard_sizes
        self._shard_starts = np.cumsum(shard_sizes) - shard_sizes
        self._pieces: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._lines: OrderedDict[int, tuple[np.ndarray, list[int]]] = OrderedDict()

    def epoch_of(self, position: int) -> int:
        """How many epochs lie before `position`."""
        assert position >= 0
        return position // self.length

    def sample_at(self, position: int, tries: int = 0) -> int:
        """Number of the sample at `position`, or of the one `tries` places on in its epoch."""
        assert position >= 0
        epoch, place = divmod(position, self.length)
        place = (place + tries) % self.size
        if self.window == self.size:
            return int(self._piece(epoch, 0, self.size)[place])
        number, start, end = self._piece_at(epoch, place)
        place = start + int(self._piece(epoch, number, end - start)[place - start])
        shards, starts = self._line(epoch)
        slot = bisect_right(starts, place) - 1  # the last of equals: empty shards precede it
        return int(self._shard_starts[shards[slot]]) + place - starts[slot]

    def bucket_at(self, position: int) -> int:
        """0: all samples are in one bucket."""
        return 0

    def epoch(self, epoch: int) -> np.ndarray:
        """All samples of an epoch in their order, int64 `[size]`; those dropped come last."""
        if self.window == self.size:
            return self._piece(epoch, 0, self.size)
        places = np.empty(self.size, dtype=np.int64)
        place = 0
        while place < self.size:
            number, start, end = self._piece_at(epoch, place)
            places[start:end] = start + self._piece(epoch, number, end - start)
            place = end
        shards, starts = self._line(epoch)
        slots = np.searchsorted(starts, places, side="right") - 1
        return self._shard_starts[shards[slots]] + places - np.array(starts)[slots]

    def _piece_at(self, epoch: int, place: int) -> tuple[int, int, int]:
        """Number, start and end of the piece that holds `place` of an epoch."""
        cut = randomness.integer(self.window, self._seed, (*self._stream, "cut"), epoch)
        number = (place + self.window - cut) // self.window
        start = number * self.window + cut - self.window
        return number, max(0, start), min(self.size, start + self.window)

    def _piece(self, epoch: int, number: int, size: int) -> np.ndarray:
        """Permutation within piece `number`, which has `size` places."""
        key = (epoch, number)
        if key not in self._pieces:
            # The epoch is part of the name and not of the index, so that no two pieces share one.
            stream = (*self._stream, str(epoch))
            self._pieces[key] = randomness.permutation(size, self._seed, stream, number)
            if len(self._pieces) > KEPT:
                self._pieces.popitem(last=False)
        return self._pieces[key]

    def _line(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        """Shards in the epoch's order, and the place where each begins."""
        if epoch not in self._lines:
            stream = (*self._stream, "shards")
            shards = randomness.permutation(len(self._shard_sizes), self._seed, stream, epoch)
            sizes = self._shard_sizes[shards]
            self._lines[epoch] = (shards, (np.cumsum(sizes) - sizes).tolist())
            if len(self._lines) > KEPT:
                self._lines.popitem(last=False)
        return self._lines[epoch]
