"""What a sample and a source of samples are, whatever the pictures lie in.

The first words of the data part: `folder.py` and `shard_source.py` make sources, `source.py` opens
them, everything after reads through the protocol here. Invariant: `read(n)` returns exactly the
bytes whose sha256 is `records[n].digest`, or raises DataError; the order of records is the same on
every machine, and `digest` changes when any picture, caption, mask or key does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Protocol

import numpy as np

from disttrain.errors import DataError

_SHOWN = 5
LENIENT_FROM = 100
"""Sets of so many samples may lose one in a hundred when nothing else is said."""


@dataclass(frozen=True, slots=True)
class SampleRecord:
    """What is known of a sample without reading its picture.

    `digest` is the sha256 of the picture file; `width` and `height` are pixels after orientation.
    """

    key: str
    digest: str
    caption: str | None
    width: int
    height: int

    @property
    def stem(self) -> str:
        """The key without folders: the file name that "filewords" prompts are made of."""
        return self.key.rpartition("/")[2]


class Source(Protocol):
    """A fixed sequence of pictures. Safe to use from several threads and to pickle."""

    @property
    def records(self) -> Sequence[SampleRecord]:
        """The samples in their fixed order."""
        ...

    @property
    def digest(self) -> str:
        """Hex sha256 of everything the samples hold."""
        ...

    @property
    def where(self) -> str:
        """The path or URL, for messages."""
        ...

    @property
    def ignored(self) -> Sequence[str]:
        """Names that were left out though somebody may have meant them as pictures."""
        ...

    @property
    def damaged(self) -> Sequence[str]:
        """A line for each sample that was left out at opening because it could not be read."""
        ...

    @property
    def sizes(self) -> Sequence[int]:
        """How many samples each shard holds, in order; a folder is one shard."""
        ...

    def shapes(self) -> np.ndarray:
        """Height and width in pixels of every sample after orientation: int32 [N, 2]."""
        ...

    def read(self, index: int) -> bytes:
        """Picture file of a sample; DataError if it is not what was indexed."""
        ...

    def read_mask(self, index: int) -> bytes | None:
        """Mask file of a sample, None if it has none; DataError as `read`."""
        ...


@dataclass(frozen=True)
class SourceOptions:
    """How a source is opened.

    Args:
        max_damaged: share of samples that may be left out because they cannot be read; see
            `allowance`.
        caption_column: column of a folder's metadata file that holds captions; empty: "text", else
            "caption".
        shard_folder: where indexes and shards fetched from URLs are kept. Processes and runs may
            share it.
        shard_bytes: how much of `shard_folder` shards may take; the least recently used leave.
    """

    max_damaged: float | None = None
    caption_column: str = ""
    shard_folder: Path | None = None
    shard_bytes: int = 20 * 10**9


DEFAULT_OPTIONS = SourceOptions()


def allowance(samples: int, max_damaged: float | None) -> int:
    """How many of `samples` may be damaged: a share of them, rounded down.

    None stands for one in a hundred, and for none at all where there are fewer than a hundred.
    """
    if max_damaged is None:
        return samples // 100 if samples >= LENIENT_FROM else 0
    return int(Decimal(str(max_damaged)) * samples)  # as written: 0.29 of 100 is 29, not 28.99


def refuse_too_many(where: str, damaged: Sequence[str], allowed: int, total: int) -> None:
    """DataError with a list when more than `allowed` of `total` pictures are damaged, or all."""
    if len(damaged) <= min(allowed, total - 1):
        return
    if len(damaged) == 1:
        raise DataError(damaged[0])
    more = f"; and {len(damaged) - _SHOWN} more" if len(damaged) > _SHOWN else ""
    raise DataError(
        f"data.max_damaged: {where}: {len(damaged)} of {total} pictures cannot be used "
        f"({allowed} may be): {'; '.join(damaged[:_SHOWN])}{more}"
    )
