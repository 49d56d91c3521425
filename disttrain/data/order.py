"""Which sample comes when: a plan that can be asked at any position, not a stream.

Between the sources and the loader. Invariant: the sample at a position is a function of (sizes,
seed, subject, stream, window, position) alone, and each epoch holds every sample exactly once. So
any rank, worker or restarted run that asks for a position gets the same answer, and the state of
the order is the position.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from disttrain import randomness

_KEPT = 2  # an epoch's end and the next one's start are asked for in turns by a batch across both


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

    Memory: the permutation of at most two pieces (8 bytes a sample) and of the shards.
    """

    def __init__(
        self,
        sizes: int | Sequence[int],
        seed: int,
        subject: str,
        stream: str = "order",
        window: int | None = None,
    ) -> None:
        shard_sizes = np.array([sizes] if isinstance(sizes, int) else sizes, dtype=np.int64)
        assert len(shard_sizes) > 0
        assert shard_sizes.min() >= 0
        self.size = int(shard_sizes.sum())
        assert self.size > 0, "an order needs at least one sample"
        assert window is None or window > 0
        self.window = self.size if window is None else min(window, self.size)
        self._seed, self._stream = seed, (subject, stream)
        self._shard_sizes = shard_sizes
        self._shard_starts = np.cumsum(shard_sizes) - shard_sizes
        self._pieces: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._lines: OrderedDict[int, tuple[np.ndarray, list[int]]] = OrderedDict()

    def epoch_of(self, position: int) -> int:
        """How often every sample has come before `position`."""
        assert position >= 0
        return position // self.size

    def sample_at(self, position: int) -> int:
        """Number of the sample at `position`, which counts on over all epochs."""
        assert position >= 0
        epoch, place = divmod(position, self.size)
        if self.window == self.size:
            return int(self._piece(epoch, 0, 0, self.size)[place])
        cut = randomness.integer(self.window, self._seed, (*self._stream, "cut"), epoch)
        number = (place + self.window - cut) // self.window
        start = max(0, number * self.window + cut - self.window)
        end = min(self.size, number * self.window + cut)
        place = start + int(self._piece(epoch, number, start, end)[place - start])
        shards, starts = self._line(epoch)
        slot = bisect_right(starts, place) - 1  # the last of equals: empty shards precede it
        return int(self._shard_starts[shards[slot]]) + place - starts[slot]

    def _piece(self, epoch: int, number: int, start: int, end: int) -> np.ndarray:
        """Permutation within piece `number`, which covers places start to end of the epoch."""
        key = (epoch, number)
        if key not in self._pieces:
            # The epoch is part of the name and not of the index, so that no two pieces share one.
            stream = (*self._stream, str(epoch))
            self._pieces[key] = randomness.permutation(end - start, self._seed, stream, number)
            if len(self._pieces) > _KEPT:
                self._pieces.popitem(last=False)
        return self._pieces[key]

    def _line(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        """Shards in the epoch's order, and the place where each begins."""
        if epoch not in self._lines:
            stream = (*self._stream, "shards")
            shards = randomness.permutation(len(self._shard_sizes), self._seed, stream, epoch)
            sizes = self._shard_sizes[shards]
            self._lines[epoch] = (shards, (np.cumsum(sizes) - sizes).tolist())
            if len(self._lines) > _KEPT:
                self._lines.popitem(last=False)
        return self._lines[epoch]
