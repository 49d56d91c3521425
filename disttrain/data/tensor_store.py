"""Tensors on disk by the digest of what they were made from: shared by runs, subjects and ranks.

Under `latents.py` and the cache of text embeddings. Invariant: `read` returns a tensor only if its
type, shape and every byte are those whose digest was noted at writing; anything else counts as
absent, so that it is computed again.

The folder holds safetensors files named PREFIX-DIGEST.safetensors (digest of the keys inside), each
with some of the items: tensors by key; in the metadata under "digests" the digest of each, and the
digest of the model they were computed with. Files are only ever added; the same file is written by
whoever has the same items to write.

Files are read with plain reads, not mapped: a mapped file that another process cuts short kills the
reader. An item takes one open and one read at a place known from the scan; keeping files open in
between would save a tenth of the time, most of which goes into the digest.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch

from disttrain import files
from disttrain.data.plain_files import open_plain

ITEMS_PER_FILE = 64
SECONDS_PER_FILE = 20.0  # a slow rank must show progress well within the others' patience
_TYPE_NAMES = {torch.float32: "F32", torch.float16: "F16"}
_HEADER_LIMIT = 16 * 2**20

_log = logging.getLogger(__name__)


class _Place(NamedTuple):
    """Where an item lies: its first byte in a file, its shape, and the digest it must have."""

    path: Path
    begin: int
    shape: tuple[int, ...]
    digest: str


class TensorStore:
    """The files of a folder that belong to one model, one kind of item and one type.

    Args:
        folder: made when something is written.
        prefix: of the files' names; different for different models, sizes and types.
        model: what the model is called in the metadata, and the digest of its weights.
        dtype: of every item, float32 or float16.
    """

    def __init__(
        self,
        folder: Path,
        prefix: str,
        model: tuple[str, str],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.folder, self.dtype = folder, dtype
        self._prefix, self._model = prefix, model
        self._seen: set[tuple[str, int, int]] = set()
        self._places: dict[str, tuple[_Place, ...]] = {}

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
                places = self._places_in(path)
            except (OSError, ValueError, RecursionError) as error:
                _log.warning("%s: damaged cache file, ignored (%s)", path, error)
                continue
            for key, place in places.items():
                others = [other for other in self._places.get(key, ()) if other.path != path]
                self._places[key] = (*others, place)

    def read(self, key: str) -> torch.Tensor | None:
        """The intact copy of an item, None if there is none."""
        for place in self._places.get(key, ()):
            try:
                found = self._read(place)
                if _digest(found) == place.digest:
                    return found
                reason = "its digest does not fit"
            except (OSError, ValueError) as error:
                reason = str(error)
            _log.warning("%s: damaged item, ignored (%s)", place.path, reason)
        self._places.pop(key, None)
        return None

    def write(self, items: dict[str, torch.Tensor]) -> None:
        """Add a file with these items."""
        assert all(value.dtype == self.dtype for value in items.values())
        digests = {key: _digest(value) for key, value in items.items()}
        metadata = {self._model[0]: self._model[1], "digests": json.dumps(digests)}
        name = f"{self._prefix}-{files.digest_of(sorted(items))[:16]}.safetensors"
        files.write_tensors(self.folder / name, items, metadata)

    def write_all(self, items: Iterable[tuple[str, torch.Tensor]]) -> int:
        """Add files with items as they come, in pieces; returns how many came.

        When taking the next item raises, those that came before are kept.
        """
        ready: dict[str, torch.Tensor] = {}
        count, written = 0, time.monotonic()
        try:
            for key, value in items:
                ready[key] = value
                count += 1
                late = time.monotonic() - written > SECONDS_PER_FILE
                if late or len(ready) >= ITEMS_PER_FILE:
                    self.write(ready)
                    ready, written = {}, time.monotonic()
        finally:
            if ready:
                self.write(ready)
        return count

    def _read(self, place: _Place) -> torch.Tensor:
        found = torch.empty(place.shape, dtype=self.dtype)
        descriptor = open_plain(place.path)
        try:
            count = os.preadv(
                descriptor, [found.view(-1).view(torch.uint8).numpy().data], place.begin
            )
        finally:
            os.close(descriptor)
        if count != found.nbytes:
            raise ValueError("cut short")
        return found

    def _places_in(self, path: Path) -> dict[str, _Place]:
        """Items of a file by its header. Raises ValueError where it is not such a file."""
        header, begin, end = _header(path)
        metadata = header.get("__metadata__")
        if not isinstance(metadata, dict) or metadata.get(self._model[0]) != self._model[1]:
            raise ValueError("its metadata is of another model or damaged")
        text = metadata.get("digests")
        digests = json.loads(text) if isinstance(text, str) else None
        if not isinstance(digests, dict):
            raise ValueError("it has no digests")
        found = {}
        for key, digest in digests.items():
            entry = header.get(key)
            if not isinstance(digest, str) or not isinstance(entry, dict):
                continue
            shape, offset = self._layout(entry, end - begin)
            found[key] = _Place(path, begin + offset, shape, digest)
        return found

    def _layout(self, entry: dict[str, Any], room: int) -> tuple[tuple[int, ...], int]:
        """Shape of an item and where it begins among the values."""
        shape, offsets = entry.get("shape"), entry.get("data_offsets")
        if entry.get("dtype") != _TYPE_NAMES[self.dtype]:
            raise ValueError("an item is of another type")
        if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
            raise ValueError("damaged header")
        size = math.prod(shape) * self.dtype.itemsize
        if not 0 < size == offsets[1] - offsets[0] or offsets[1] > room:
            raise ValueError("an item does not fit into the file")
        return tuple(shape), offsets[0]


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Header of a safetensors file, where its values begin, and where the file ends.

    The format: the length of the header as 8 bytes, little end first; the header, JSON of
    {name: {"dtype", "shape", "data_offsets": [begin, end]}} with free text under "__metadata__";
    the values, to which the offsets are relative.
    """
    descriptor = open_plain(path)
    try:
        size = os.fstat(descriptor).st_size
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        if not 0 < length <= min(_HEADER_LIMIT, size - 8):
            raise ValueError("not a whole safetensors file")
        header = json.loads(os.pread(descriptor, length, 8))
    finally:
        os.close(descriptor)
    if not isinstance(header, dict):
        raise ValueError("damaged header")
    return header, 8 + length, size


def _whole_numbers(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _digest(value: torch.Tensor) -> str:
    """Digest of a tensor with its shape and type."""
    head = f"{value.dtype} {tuple(value.shape)} ".encode()
    return files.sha256_bytes(head + value.contiguous().numpy().tobytes())
