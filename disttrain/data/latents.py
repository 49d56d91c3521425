"""Pictures -> moments of the autoencoder's posterior, computed once for all runs and subjects.

Between `source.py` and `loader.py`. Invariant: `get` returns the moments of exactly one (picture
bytes, window, mirroring, size, autoencoder, precision), because all of these make up the key of the
item in `tensor_store.py`. Pictures are encoded one at a time and in a fixed order, so the bits
never depend on what else was in a batch or on how many threads decode ahead.

Ranks do not talk to each other: each computes its share of what is missing and waits for the files
of the others, so that no collective can time out here. A picture that cannot be read is no item to
wait for: whether it can is a property of its file, so each rank finds out for itself. Nothing is
noted of it on disk, since the file may be mended.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from disttrain import files, randomness
from disttrain.data import images
from disttrain.data.samples import refuse_too_many
from disttrain.data.source import SampleRecord, Source
from disttrain.data.tensor_store import TensorStore
from disttrain.data.window import fit, reduction
from disttrain.data.workers import in_order
from disttrain.errors import DataError

Encode = Callable[[torch.Tensor], torch.Tensor]
"""Pictures [N, 3, H, W] in [-1, 1] -> moments [N, 2C, h, w], mean then log variance."""
Precision = Literal["float32", "float16"]
STALL_SECONDS = 600.0
MEMORY_LIMIT = 8 * 2**30
WINDOWS_TOGETHER = 16
"""Versions of one picture that are made from one decoding; bounds what waits for the encoder."""
_VERSION = 3
_REDUCED_VERSION = 4
"""Part of every key, raised when decoding or fitting a picture changes its pixels; the second for
those so large that a JPEG of their size is decoded at a fraction of it."""


@dataclass(frozen=True)
class Variants:
    """Which versions of each picture are cached.

    Args:
        crops: 1 for the centre window, else that number of windows at places drawn from the
            picture's digest and the window's number.
        random: whether windows are drawn; without it `crops` is 1.
        flip: keep the mirror image of each as well.
    """

    crops: int = 1
    random: bool = False
    flip: bool = False

    def __post_init__(self) -> None:
        assert self.crops >= 1
        assert self.random or self.crops == 1

    @property
    def count(self) -> int:
        """Number of versions of a picture; a variant is a number below it."""
        return self.crops * (2 if self.flip else 1)

    def placement(
        self, record: SampleRecord, variant: int, height: int, width: int
    ) -> tuple[tuple[float, float], bool]:
        """Window and mirroring of a variant, as `window.fit` takes them.

        A direction without slack says 0.5, so that equal windows have equal names.
        """
        assert 0 <= variant < self.count
        down = across = 0.5
        if self.random:
            stream = ("crop", record.digest)
            draws = randomness.generator(0, stream, variant % self.crops).random(2)
            down, across = float(draws[0]), float(draws[1])
        slack = record.width * height - record.height * width
        return (down if slack < 0 else 0.5, across if slack > 0 else 0.5), variant >= self.crops


@dataclass(slots=True)
class _Item:
    """One thing to encode: a picture in one version, and the samples that are this picture."""

    key: str
    samples: list[int]
    crop: tuple[float, float]
    flip: bool


class LatentCache:
    """Moments of all variants of a source's pictures at one size.

    `damaged` says after `prepare` which samples have a picture that cannot be read or decoded, and
    why; it is the same on every rank. What to do about them is the caller's business.

    Args:
        source: where the pictures are.
        folder: of the cache; made when needed, shared freely between runs, subjects and ranks.
        resolution: pixels, the side of a square or (height, width).
        vae_digest: hex digest of the autoencoder's weights.
        precision: how moments are stored and returned; float16 clamps them to its finite range.
        samples: which of the source's samples belong to this cache; None for all.
        memory_limit: bytes of moments kept in memory; the rest is read from disk each time.
        allowed: how many damaged pictures a call may find before it gives up; None for any number.
    """

    def __init__(
        self,
        source: Source,
        folder: Path,
        *,
        variants: Variants,
        resolution: int | tuple[int, int],
        vae_digest: str,
        precision: Precision = "float32",
        samples: Sequence[int] | None = None,
        memory_limit: int = MEMORY_LIMIT,
        allowed: int | None = None,
    ) -> None:
        size = (resolution, resolution) if isinstance(resolution, int) else resolution
        self.height, self.width = size
        self.variants = variants
        self.samples = range(len(source.records)) if samples is None else samples
        self.damaged: dict[int, str] = {}
        self._allowed = allowed
        self._source, self._vae_digest = source, vae_digest
        self._half = precision == "float16"
        kind = f"{vae_digest[:12]}-float16" if self._half else vae_digest[:12]
        self._store = TensorStore(
            folder,
            f"{kind}-{self.height}x{self.width}",
            ("vae", vae_digest),
            torch.float16 if self._half else torch.float32,
        )
        self._memory: dict[str, torch.Tensor] = {}
        self._room = memory_limit
        self._patience = 0.0

    def missing(self, rank: int = 0, world: int = 1) -> int:
        """How many items this rank would have to encode now; 0 means no autoencoder is needed.

        Pictures that cannot be read are counted until `prepare` has found them.
        """
        self._store.scan()
        work = self._missing(self._items()[rank::world])
        return sum(not self._is_damaged(item) for item in work)

    def prepare(
        self,
        encode: Encode,
        *,
        rank: int = 0,
        world: int = 1,
        threads: int = 2,
        stall_seconds: float = STALL_SECONDS,
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Encode this rank's share of what is missing, then wait until the other shares are there.

        What is there of the share is compared with its digest; damaged items are encoded again. A
        cancelled call keeps what it has encoded. `encode` is called only when something is missing,
        by the calling thread, in the order of samples and variants. Pictures that cannot be read
        or decoded are passed over and noted in `damaged`, which each call makes anew.

        Args:
            rank, world: place among the processes that use the same folder at this moment.
            threads: how many decode pictures ahead of `encode`; 0 decodes in between.
            stall_seconds: give up when the other ranks add nothing for so long.
            progress: told items done and to do, of this rank.

        Returns:
            How many items this call encoded.

        Raises:
            DataError: moments are not finite, or the others stalled.
        """
        items = self._items()
        self.damaged = {}
        self._patience = stall_seconds if world > 1 else 0.0
        self._store.scan()
        work = self._missing(items[rank::world])
        count = self._store.write_all(self._encoded(work, encode, threads, progress))
        self._store.scan()
        others = [item for number, item in enumerate(items) if number % world != rank]
        self._wait(others, lambda item: item.key in self._store, looks=True)
        self.damaged = dict(sorted(self.damaged.items()))
        return count

    def get(self, sample: int, variant: int) -> torch.Tensor:
        """Moments [2C, h, w] of a sample's variant in the cache's precision; not to be written to.

        Raises:
            DataError: its picture is damaged; or not prepared, or its moments damaged since.
        """
        if sample in self.damaged:
            raise DataError(self.damaged[sample])
        item = self._item(sample, variant)
        found = self._load(item)
        if found is None:
            # Another rank may be replacing a damaged item that it found; its file is soon here.
            self._wait([item], lambda item: self._load(item) is not None)
            found = self._load(item)
            assert found is not None
        return found

    def _load(self, item: _Item) -> torch.Tensor | None:
        """Moments of an item where the cache has them intact."""
        if item.key in self._memory:
            return self._memory[item.key]
        found = self._store.read(item.key)
        if found is not None and found.nbytes <= self._room:
            self._room -= found.nbytes
            self._memory[item.key] = found
        return found

    def _item(self, sample: int, variant: int) -> _Item:
        record = self._source.records[sample]
        crop, flip = self.variants.placement(record, variant, self.height, self.width)
        size = (self.height, self.width)
        reduced = reduction((record.height, record.width), size) > 1
        version = _REDUCED_VERSION if reduced else _VERSION
        parts = [version, record.digest, list(crop), flip, *size, self._vae_digest]
        key = files.digest_of([*parts, "float16"] if self._half else parts)
        return _Item(key, [sample], crop, flip)

    def _items(self) -> list[_Item]:
        """Every different item, in the order of samples and variants."""
        found: dict[str, _Item] = {}
        for sample in self.samples:
            for variant in range(self.variants.count):
                item = self._item(sample, variant)
                first = found.setdefault(item.key, item)
                if sample != first.samples[-1]:
                    first.samples.append(sample)
        return list(found.values())

    def _missing(self, items: Sequence[_Item]) -> list[_Item]:
        return [item for item in items if self._load(item) is None]

    def _is_damaged(self, item: _Item) -> bool:
        return item.samples[0] in self.damaged

    def _encoded(
        self,
        work: list[_Item],
        encode: Encode,
        threads: int,
        progress: Callable[[int, int], None] | None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Keys and moments of items; those of damaged pictures are passed over."""
        groups = [
            together[begin:][:WINDOWS_TOGETHER]
            for _, same in groupby(work, key=lambda item: item.samples)
            for together in [list(same)]
            for begin in range(0, len(together), WINDOWS_TOGETHER)
        ]
        if threads:
            windows = in_order(self._windows, groups, threads, threading.Event())
        else:
            windows = (self._windows(group) for group in groups)
        done = 0
        with closing(windows):
            for group, found in zip(groups, windows, strict=True):
                for item, window in zip(group, found, strict=True):
                    if window is not None:
                        yield item.key, self._encode(item, window, encode)
                    done += 1
                    if progress is not None:
                        progress(done, len(work))

    def _windows(self, group: Sequence[_Item]) -> list[np.ndarray | None]:
        """Pixels [height, width, 3] of several versions of a picture; Nones if it is damaged."""
        pixels = self._decode(group[0])
        if pixels is None:
            return [None] * len(group)
        return [fit(pixels, self.height, self.width, i.crop, i.flip) for i in group]

    def _decode(self, item: _Item) -> np.ndarray | None:
        """Pixels of an item's picture; None where none of its samples can be read, now noted."""
        reasons: dict[int, str] = {}
        for sample in item.samples:
            try:
                data = self._source.read(sample)
                picture = images.decode(
                    data, self._where(sample), at_least=(self.height, self.width)
                )
            except DataError as error:
                reasons[sample] = str(error)
            else:
                return picture.pixels
        self.damaged.update(reasons)
        if self._allowed is not None:
            lines, total = list(self.damaged.values()), len(self._source.records)
            refuse_too_many(self._source.where, lines, self._allowed, total)
        return None

    def _where(self, sample: int) -> str:
        return f"{self._source.where}: {self._source.records[sample].key}"

    def _encode(self, item: _Item, window: np.ndarray, encode: Encode) -> torch.Tensor:
        values = torch.from_numpy(window.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)
        with torch.no_grad():
            moments = encode(values[None].contiguous())[0].detach().float().cpu()
        assert moments.ndim == 3
        if not torch.isfinite(moments).all():
            raise DataError(
                f"{self._where(item.samples[0])}: the autoencoder gives values that are not "
                "finite; load the base model in float32"
            )
        if self._half:
            most = torch.finfo(torch.float16).max
            return moments.clamp(-most, most).half()
        return moments

    def _wait(
        self, items: Sequence[_Item], there: Callable[[_Item], bool], *, looks: bool = False
    ) -> None:
        """Look for new files until every item is there, as long as the others make progress.

        With `looks` half of the waiting goes into finding out which pictures cannot be read, since
        nobody will write those.
        """
        absent = [item for item in items if not there(item)]
        unknown = deque(absent if looks else ())
        last, pause = time.monotonic(), 0.05
        while absent:
            if time.monotonic() - last >= self._patience:
                raise DataError(self._stalled(absent))
            until = time.monotonic() + pause
            while unknown and time.monotonic() < until:
                item = unknown.popleft()
                if not there(item) and not self._is_damaged(item):
                    self._decode(item)
            time.sleep(pause)
            pause = min(2 * pause, 1.0)
            self._store.scan()
            still = [item for item in absent if not there(item) and not self._is_damaged(item)]
            if len(still) < len(absent):
                last, pause = time.monotonic(), 0.05
            absent = still

    def _stalled(self, absent: Sequence[_Item]) -> str:
        keys = sorted({self._source.records[item.samples[0]].key for item in absent})
        return (
            f"{self._store.folder}: {len(absent)} latents are missing, of "
            f"{', '.join(keys[:5])}{' ...' if len(keys) > 5 else ''} (waited "
            f"{self._patience:.0f} s for other ranks, which must share this folder); "
            "run again to go on"
        )
