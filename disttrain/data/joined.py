"""Several sources as one: class pictures that a person gave, then those that were drawn.

Beside `source.py`. Invariant: sample i is always the same sample of the same part.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from disttrain import files
from disttrain.data.source import SampleRecord, Source


class JoinedSource:
    """The first `limit` samples of sources laid end to end. A `Source` itself."""

    def __init__(self, parts: Sequence[Source], limit: int) -> None:
        assert parts
        assert limit > 0
        self._parts = parts
        self._places = [(part, i) for part in parts for i in range(len(part.records))][:limit]
        self.records: Sequence[SampleRecord] = [part.records[i] for part, i in self._places]
        self.digest = files.digest_of([*(part.digest for part in parts), limit])
        self.where = " and ".join(part.where for part in parts)
        self.ignored = [name for part in parts for name in part.ignored]
        self.damaged = [line for part in parts for line in part.damaged]
        self.sizes: Sequence[int] = [len(self.records)]

    def shapes(self) -> np.ndarray:
        """Height and width of every sample, int32 `[N, 2]`."""
        return np.array([[r.height, r.width] for r in self.records], dtype=np.int32)

    def read(self, index: int) -> bytes:
        """Picture file of a sample; DataError if it is not what was indexed."""
        part, number = self._places[index]
        return part.read(number)

    def read_mask(self, index: int) -> bytes | None:
        """Mask file of a sample, None if it has none; DataError as `read`."""
        part, number = self._places[index]
        return part.read_mask(number)
