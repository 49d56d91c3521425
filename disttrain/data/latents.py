"""Pictures -> moments of the autoencoder's posterior, computed once for all runs and subjects.

Between `source.py` and `loader.py`. Invariant: `get` returns the moments of exactly one (picture
bytes, window, mirroring, size, autoencoder), because all of these make up the key; whatever is read
from the cache is compared with the digest stored at writing, and anything else is computed again.
Pictures are encoded one at a time, so the bits never depend on what else was in a batch.

The cache folder holds safetensors files named VAE-HEIGHTxWIDTH-DIGEST.safetensors (first 12 hex
digits of the autoencoder's digest; digest of the keys inside), each with some of the items: float32
tensors by key, and in the metadata under "digests" the digest of each. Files are only ever added;
the same file is written by whoever has the same items to compute.

Ranks do not talk to each other: each computes its share of what is missing and waits for the files
of the others, so that no collective can time out here.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from disttrain import files, randomness
from disttrain.data import images
from disttrain.data.source import SampleRecord, Source
from disttrain.errors import DataError

Encode = Callable[[torch.Tensor], torch.Tensor]
"""Pictures [N, 3, H, W] in [-1, 1] -> moments [N, 2C, h, w], mean then log variance."""
ITEMS_PER_FILE = 64
SECONDS_PER_FILE = 20.0  # a slow rank must show progress well within the others' patience
STALL_SECONDS = 600.0
MEMORY_LIMIT = 8 * 2**30
_VERSION = 1
"""Part of every key; raised when decoding or fitting a picture changes its pixels."""

_log = logging.getLogger(__name__)


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
        """Window and mirroring of a variant, as `images.fit` takes them.

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


@dataclass(frozen=True)
class _Item:
    """One thing to encode: a picture in one version."""

    key: str
    sample: int
    crop: tuple[float, float]
    flip: bool


class LatentCache:
    """Moments of all variants of a source's pictures at one size.

    Args:
        source: where the pictures are.
        folder: of the cache; made when needed, shared freely between runs, subjects and ranks.
        resolution: pixels, the side of a square or (height, width).
        vae_digest: hex digest of the autoencoder's weights.
        memory_limit: bytes of moments kept in memory; the rest is read from disk each time.
    """

    def __init__(
        self,
        source: Source,
        folder: Path,
        *,
        variants: Variants,
        resolution: int | tuple[int, int],
        vae_digest: str,
        memory_limit: int = MEMORY_LIMIT,
    ) -> None:
        size = (resolution, resolution) if isinstance(resolution, int) else resolution
        self.height, self.width = size
        self.variants = variants
        self._source, self._vae_digest = source, vae_digest
        self._store = _Store(folder, f"{vae_digest[:12]}-{self.height}x{self.width}", vae_digest)
        self._memory: dict[str, torch.Tensor] = {}
        self._room = memory_limit
        self._patience = 0.0

    def missing(self, rank: int = 0, world: int = 1) -> int:
        """How many items this rank would have to encode now; 0 means no autoencoder is needed."""
        self._store.scan()
        return len(self._missing(self._items()[rank::world]))

    def prepare(
        self,
        encode: Encode,
        *,
        rank: int = 0,
        world: int = 1,
        stall_seconds: float = STALL_SECONDS,
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Encode this rank's share of what is missing, then wait until the other shares are there.

        What is there of the share is compared with its digest; damaged items are encoded again. A
        cancelled call keeps what it has encoded. `encode` is called only when something is missing.

        Args:
            rank, world: place among the processes that use the same folder at this moment.
            stall_seconds: give up when the other ranks add nothing for so long.
            progress: told items encoded and to encode, of this rank.

        Returns:
            How many items this call encoded.

        Raises:
            DataError: a picture cannot be read, its moments are not finite, or the others stalled.
        """
        items = self._items()
        self._patience = stall_seconds if world > 1 else 0.0
        self._store.scan()
        work = self._missing(items[rank::world])
        self._encode_all(work, encode, progress)
        self._store.scan()
        others = [item for number, item in enumerate(items) if number % world != rank]
        self._wait(others, lambda item: item.key in self._store)
        return len(work)

    def get(self, sample: int, variant: int) -> torch.Tensor:
        """Moments [2C, h, w] of a sample's variant, float32; not to be written into.

        Raises:
            DataError: not prepared, or damaged since.
        """
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
        if found is not None:
            size = found.numel() * found.element_size()
            if size <= self._room:
                self._room -= size
                self._memory[item.key] = found
        return found

    def _item(self, sample: int, variant: int) -> _Item:
        record = self._source.records[sample]
        crop, flip = self.variants.placement(record, variant, self.height, self.width)
        key = files.digest_of(
            [_VERSION, record.digest, list(crop), flip, self.height, self.width, self._vae_digest]
        )
        return _Item(key, sample, crop, flip)

    def _items(self) -> list[_Item]:
        """Every different item, in the order of samples and variants."""
        found: dict[str, _Item] = {}
        for sample in range(len(self._source.records)):
            for variant in range(self.variants.count):
                item = self._item(sample, variant)
                found.setdefault(item.key, item)
        return list(found.values())

    def _missing(self, items: Sequence[_Item]) -> list[_Item]:
        return [item for item in items if self._load(item) is None]

    def _encode_all(
        self,
        work: list[_Item],
        encode: Encode,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        ready: dict[str, torch.Tensor] = {}
        written = time.monotonic()
        try:
            for number, item in enumerate(work):
                ready[item.key] = self._encode(item, encode)
                if progress is not None:
                    progress(number + 1, len(work))
                late = time.monotonic() - written > SECONDS_PER_FILE
                if late or len(ready) == ITEMS_PER_FILE:
                    self._store.write(ready)
                    ready, written = {}, time.monotonic()
        finally:
            if ready:
                self._store.write(ready)

    def _encode(self, item: _Item, encode: Encode) -> torch.Tensor:
        record = self._source.records[item.sample]
        where = f"{self._source.where}: {record.key}"
        picture = images.decode(self._source.read(item.sample), where)
        window = images.fit(picture.pixels, self.height, self.width, item.crop, item.flip)
        values = torch.from_numpy(window.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)
        with torch.no_grad():
            moments = encode(values[None].contiguous())[0].detach().float().cpu()
        assert moments.ndim == 3
        if not torch.isfinite(moments).all():
            raise DataError(
                f"{where}: the autoencoder gives values that are not finite; "
                "load the base model in float32"
            )
        return moments

    def _wait(self, items: Sequence[_Item], there: Callable[[_Item], bool]) -> None:
        """Look for new files until every item is there, as long as the others make progress."""
        absent = [item for item in items if not there(item)]
        last, pause = time.monotonic(), 0.05
        while absent:
            if time.monotonic() - last >= self._patience:
                keys = sorted({self._source.records[item.sample].key for item in absent})
                raise DataError(
                    f"{self._store.folder}: {len(absent)} latents are missing, of "
                    f"{', '.join(keys[:5])}{' ...' if len(keys) > 5 else ''} (waited "
                    f"{self._patience:.0f} s for other ranks, which must share this folder); "
                    "run again to go on"
                )
            time.sleep(pause)
            pause = min(2 * pause, 1.0)
            self._store.scan()
            still = [item for item in absent if not there(item)]
            if len(still) < len(absent):
                last, pause = time.monotonic(), 0.05
            absent = still


class _Store:
    """The files of a cache folder that belong to one autoencoder and size."""

    def __init__(self, folder: Path, prefix: str, vae_digest: str) -> None:
        self.folder, self._prefix, self._vae_digest = folder, prefix, vae_digest
        self._seen: set[tuple[str, int, int]] = set()
        self._places: dict[str, dict[Path, str]] = {}
        """Item key -> its digest in each file that has it."""

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def scan(self) -> None:
        """Take note of files that are new or replaced since the last call."""
        for path in sorted(self.folder.glob(f"{self._prefix}-*.safetensors")):
            try:
                status = path.stat()
                mark = (path.name, status.st_size, status.st_mtime_ns)
                if mark in self._seen:
                    continue
                self._seen.add(mark)
                digests = self._digests(path)
            except (OSError, SafetensorError, ValueError, RecursionError) as error:
                _log.warning("%s: damaged cache file, ignored (%s)", path, error)
                continue
            for key, digest in digests.items():
                self._places.setdefault(key, {})[path] = digest

    def read(self, key: str) -> torch.Tensor | None:
        """The intact copy of an item, None if there is none."""
        for path, digest in list(self._places.get(key, {}).items()):
            try:
                with safe_open(path, framework="pt") as handle:
                    found = handle.get_tensor(key)
                if found.dtype == torch.float32 and _digest(found) == digest:
                    return found
                reason = "its digest does not fit"
            except (OSError, SafetensorError, ValueError) as error:
                reason = str(error)
            _log.warning("%s: damaged item, ignored (%s)", path, reason)
            del self._places[key][path]
        self._places.pop(key, None)
        return None

    def write(self, items: dict[str, torch.Tensor]) -> None:
        """Add a file with these items."""
        digests = {key: _digest(value) for key, value in items.items()}
        metadata = {"vae": self._vae_digest, "digests": json.dumps(digests)}
        name = f"{self._prefix}-{files.digest_of(sorted(items))[:16]}.safetensors"
        files.write_tensors(self.folder / name, items, metadata)

    def _digests(self, path: Path) -> dict[str, str]:
        """Digest of each item of a file. Raises ValueError where it is not such a file."""
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            names = set(handle.keys())
        digests = json.loads(metadata.get("digests", "null"))
        if metadata.get("vae") != self._vae_digest or not isinstance(digests, dict):
            raise ValueError("its metadata is of another autoencoder or damaged")
        return {
            key: digest
            for key, digest in digests.items()
            if key in names and isinstance(digest, str)
        }


def _digest(value: torch.Tensor) -> str:
    """Digest of a tensor with its shape and type."""
    head = f"{value.dtype} {tuple(value.shape)} ".encode()
    return files.sha256_bytes(head + value.contiguous().numpy().tobytes())
