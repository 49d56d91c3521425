"""Samples of tar shards as a source: any picture is one seek away, through the index.

Beside `folder.py`, under `source.py`. Invariant: every read compares what it returns with the
digest in the index, whatever happened to the shard or to its local copy.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import numpy as np

from disttrain import files
from disttrain.data import images
from disttrain.data.index import SampleRow, ShardIndex
from disttrain.data.plain_files import open_plain
from disttrain.data.samples import DEFAULT_OPTIONS, SampleRecord, SourceOptions
from disttrain.data.shard_cache import ShardCache
from disttrain.errors import DataError

OPEN_SHARDS = 64
"""How many local shards a source keeps open."""
OPEN_COPIES = 8
"""How many copies of remote shards a source keeps open, and thereby from being removed."""
REST = 60.0
"""Seconds in which a remote shard that could not be fetched is not asked for again."""


class ShardSource:
    """The samples of tar shards, each read by one seek through their index (`data/index.py`).

    Args:
        path: the index, or a local copy of it.
        origin: the URL that `path` is a copy of.

    Raises:
        DataError: the index is missing or damaged, or names remote shards and the options have no
            folder for copies. Shards are looked at when they are read.
    """

    ignored: Sequence[str] = ()
    damaged: Sequence[str] = ()

    def __init__(
        self, path: Path, options: SourceOptions = DEFAULT_OPTIONS, origin: str | None = None
    ) -> None:
        self.index = ShardIndex(path, origin)
        self.where, self.digest = self.index.where, self.index.digest
        self.records: Sequence[SampleRecord] = _Records(self.index)
        self.sizes = [shard.samples for shard in self.index.shards]
        self._options = options
        remote = any(isinstance(place, str) for place in self.index.places)
        self._cache = _cache(options, self.where) if remote else None
        self._most = OPEN_COPIES if remote else OPEN_SHARDS
        self._handles: OrderedDict[int, _Handle] = OrderedDict()
        self._lock = threading.Lock()
        self._failed: dict[int, tuple[float, str]] = {}
        self._fetched_anew: set[int] = set()

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return _reopened, (self.index.path, self._options, self.index.origin, self.digest)

    def shapes(self) -> np.ndarray:
        """Height and width in pixels of every sample after orientation: int32 [N, 2]."""
        return self.index.shapes()

    def read(self, index: int) -> bytes:
        """Picture file of a sample; DataError if its shard is missing or damaged there."""
        row = self.index.row(index)
        return self._part(index, row, row.offset, row.size, row.sha256)

    def read_mask(self, index: int) -> bytes | None:
        """Mask file of a sample, None if it has none; DataError as `read`."""
        row = self.index.row(index)
        if row.mask is None:
            return None
        return self._part(index, row, row.mask.offset, row.mask.size, row.mask.sha256)

    def _part(self, index: int, row: SampleRow, offset: int, size: int, digest: str) -> bytes:
        shard = self.index.shard_of(index)
        where = f"{self.index.places[shard]}: {row.key}"
        if size > images.MAX_BYTES:
            raise DataError(f"{where}: {size} bytes, the limit is {images.MAX_BYTES}")
        try:
            data = self._read(shard, offset, size)
            whole = files.sha256_bytes(data) == digest
            if not whole and self._fetch_anew(shard):
                data = self._read(shard, offset, size)
                whole = files.sha256_bytes(data) == digest
        except OSError as error:
            raise DataError(f"{where}: {error.strerror or error}") from error
        if not whole:
            raise DataError(
                f"{where}: damaged (its digest does not fit the index); "
                "see `disttrain shard --verify`"
            )
        return data

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        handle = self._handle(shard)  # held until the read is over
        return os.pread(handle.descriptor, size, offset)

    def _fetch_anew(self, shard: int) -> bool:
        """Drop the copy of a remote shard in which something is damaged, once."""
        if self._cache is None or not isinstance(self.index.places[shard], str):
            return False
        with self._lock:
            if shard not in self._fetched_anew:
                self._fetched_anew.add(shard)
                self._handles.pop(shard, None)
                self._cache.discard(self.index.shards[shard])
        return True  # another thread may have done so

    def _handle(self, shard: int) -> _Handle:
        with self._lock:
            if shard in self._handles:
                self._handles.move_to_end(shard)
                return self._handles[shard]
        handle = _Handle(self._opened(shard))  # not under the lock: it may be fetched first
        with self._lock:
            handle = self._handles.setdefault(shard, handle)
            self._handles.move_to_end(shard)
            if len(self._handles) > self._most:
                self._handles.popitem(last=False)
            return handle

    def _opened(self, shard: int) -> int:
        place, entry = self.index.places[shard], self.index.shards[shard]
        if isinstance(place, Path):
            return open_plain(place)
        assert self._cache is not None
        failed, reason = self._failed.get(shard, (0.0, ""))
        if reason and time.monotonic() - failed < REST:
            raise DataError(reason)
        try:
            with _in_folder(self._cache):
                return self._cache.open(entry, place)
        except DataError as error:
            self._failed[shard] = time.monotonic(), str(error)
            raise


def fetched_source(url: str, options: SourceOptions) -> ShardSource:
    """The source of a remote index, which is fetched.

    Raises:
        DataError: missing or damaged, or the options have no folder for copies.
    """
    cache = _cache(options, url)
    with _in_folder(cache):
        path = cache.index(url)
    try:
        return ShardSource(path, options, url)
    except DataError:
        path.unlink(missing_ok=True)  # it may have been cut on the way
        raise


def _reopened(
    path: Path, options: SourceOptions, origin: str | None, digest: str
) -> ShardSource | _ChangedSource:
    """A source in another process; the index may have been replaced before that opened it."""
    try:
        source = ShardSource(path, options, origin)
    except DataError as error:
        return _ChangedSource(str(error))
    if source.digest == digest:
        return source
    return _ChangedSource(f"{source.where}: changed since the run began; start the run again")


class _ChangedSource:
    """Stands in for a source that cannot be had any more: only says so when it is read."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def read(self, index: int) -> bytes:
        """Raises DataError."""
        raise DataError(self._reason)

    read_mask = read


def _cache(options: SourceOptions, where: str) -> ShardCache:
    if options.shard_folder is None:
        raise DataError(f"{where}: remote shards need a folder for their copies (shard_folder)")
    return ShardCache(options.shard_folder, options.shard_bytes)


@contextmanager
def _in_folder(cache: ShardCache) -> Iterator[None]:
    """Say what went wrong in the folder of copies: no space, no permission."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{cache.folder}: {error.strerror or error}") from error


class _Records(Sequence[SampleRecord]):
    """Records of an index, made when asked for."""

    def __init__(self, index: ShardIndex) -> None:
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, item: int) -> SampleRecord: ...
    @overload
    def __getitem__(self, item: slice) -> list[SampleRecord]: ...
    def __getitem__(self, item: int | slice) -> SampleRecord | list[SampleRecord]:
        if isinstance(item, slice):
            return [self[number] for number in range(*item.indices(len(self)))]
        number = item + len(self) if item < 0 else item
        if not 0 <= number < len(self):
            raise IndexError(item)
        row = self._index.row(number)
        return SampleRecord(row.key, row.sha256, row.caption, row.width, row.height)


class _Handle:
    """An open shard, closed when the last reader lets go of it.

    Eviction from the cache must not close a descriptor that another thread is about to read: the
    system may already have given its number to another file.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)
