"""`index.json`: what each shard holds, so that any sample is one seek away.

Between `shards.py`, which writes it, and `shard_source.py`, which reads through it. It is plain
JSON, laid out one shard and one sample a line, and read lazily: opening costs the list of shards,
whatever the number of samples. Invariant: a row is returned only from a block of lines whose sha256
is the one in the list of shards; the digest of the index covers that list, hence every sample.

    {"format":"disttrain-shards","shards":[
    {"bytes":..,"file":"..","index_bytes":..,"index_sha256":"..","samples":..,"sha256":".."},
    ...
    ],"samples":[
    {"caption":..,"height":..,"key":"..","mask":..,"offset":..,"sha256":"..","size":..,"width":..},
    ...
    ],"version":1}

`file` is relative to the index, or absolute, or a URL (see `storage.py`). `offset` and `size`
(bytes) give the picture within the tar, `sha256` its digest; `mask` is null or [offset, size,
sha256]; `width` and `height` are pixels after orientation. `index_bytes` and `index_sha256` are
about the shard's own lines under "samples" (without the comma and newline after the last). A file
laid out differently (by a formatter) is read as a whole and put back into this layout in memory.
"""

from __future__ import annotations

import io
import json
import os
import re
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from disttrain import files
from disttrain.data import storage
from disttrain.data.plain_files import fits_a_line
from disttrain.errors import DataError

VERSION = 1
REFORMATTED_LIMIT = 2**30
_HEAD = b'{"format":"disttrain-shards","shards":[\n'
_MIDDLE = b'],"samples":[\n'
_TAIL = b'],"version":%d}\n' % VERSION
_HEAD_LIMIT = 2**28
_SIDE_LIMIT = 10**9
_BYTES_LIMIT = 2**62
_DIGEST = re.compile("[0-9a-f]{64}")
# Within a JSON string the quotes would be escaped, so no caption or key can hold these.
_HEIGHT, _WIDTH = re.compile(rb'"height":(\d{1,9})[,}]'), re.compile(rb'"width":(\d{1,9})[,}]')
_REPAIR = "write it again with `disttrain shard`"


@dataclass(frozen=True, slots=True)
class MaskPlace:
    """Where a sample's mask file lies in its tar."""

    offset: int
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One sample of a shard: the fields of its line in the index."""

    key: str
    offset: int
    size: int
    sha256: str
    width: int
    height: int
    caption: str | None = None
    mask: MaskPlace | None = None

    def line(self) -> bytes:
        """The row as its line of the index, without a line end."""
        value = {name: getattr(self, name) for name in self.__slots__}
        if self.mask is not None:
            value["mask"] = [self.mask.offset, self.mask.size, self.mask.sha256]
        return _compact(value)


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One shard of the index. `samples` counts its samples, `bytes` and `sha256` are the tar's."""

    file: str
    sha256: str
    bytes: int
    samples: int
    index_bytes: int = 0
    index_sha256: str = ""


def write_index(path: Path, shards: Iterable[tuple[ShardEntry, Sequence[SampleRow]]]) -> None:
    """Write an index atomically, taking one shard's rows at a time.

    Raises:
        DataError: no shard with a sample.
    """
    entries: list[bytes] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent) as rows:
        for entry, shard_rows in shards:
            assert entry.samples == len(shard_rows) > 0
            block = b",\n".join(row.line() for row in shard_rows)
            rows.write(block if not entries else b",\n" + block)
            entries.append(_entry_line(entry, block))
        if not entries:
            raise DataError(f"{path}: no sample to index; give shards that hold pictures")
        rows.write(b"\n")
        rows.seek(0)
        with files.atomic_writer(path) as handle:
            handle.write(_HEAD + b",\n".join(entries) + b"\n" + _MIDDLE)
            while piece := rows.read(2**20):
                handle.write(piece)
            handle.write(_TAIL)


class ShardIndex:
    """An index opened for reading: `shards`, `places`, `len()`, `digest`, and `row(number)`.

    Args:
        path: the index file.
        origin: where it was fetched from, when it is a copy: names of shards count from there.

    Raises:
        DataError: missing, damaged, of another version, or with shards in places that are not read.
    """

    def __init__(self, path: Path, origin: str | None = None) -> None:
        self.path, self.origin = path, origin
        self.where = origin or str(path)
        self._file, self._bytes = self._open()
        self.shards: list[ShardEntry] = []
        position = self._read_head()
        self.places = [storage.beside(origin or path, shard.file) for shard in self.shards]
        self._starts = [0, *accumulate(shard.samples for shard in self.shards)]
        lengths = (shard.index_bytes + 2 for shard in self.shards)
        self._blocks = list(accumulate(lengths, initial=position))
        if self._blocks[-1] - 1 + len(_TAIL) != self._bytes:
            raise self._damage("its length does not fit")
        self._lines: dict[int, np.ndarray] = {}
        self._state = self._present_state()
        self.digest = files.digest_of(
            [[s.sha256, s.bytes, s.samples, s.index_sha256] for s in self.shards]
        )

    def __len__(self) -> int:
        return self._starts[-1]

    def shard_of(self, number: int) -> int:
        """Which shard holds sample `number`."""
        assert 0 <= number < len(self)
        return bisect_right(self._starts, number) - 1

    def rows(self, shard: int) -> list[SampleRow]:
        """All rows of a shard."""
        return [self.row(n) for n in range(self._starts[shard], self._starts[shard + 1])]

    def row(self, number: int) -> SampleRow:
        """The row of sample `number`, counted over all shards.

        Raises:
            DataError: the lines of its shard are damaged.
        """
        shard = self.shard_of(number)
        state = self._present_state()
        if state != self._state:  # somebody wrote into the file: what was checked may be gone
            self._lines, self._state = {}, state
        lines = self._lines
        if shard not in lines:
            lines[shard] = self._checked_lines(shard)
        ends, slot = lines[shard], number - self._starts[shard]
        start = self._blocks[shard] + (int(ends[slot - 1]) + 1 if slot else 0)
        line = self._read(start, self._blocks[shard] + int(ends[slot]) - start)
        return self._parsed_row(line.rstrip(b","), shard)

    def shapes(self) -> np.ndarray:
        """Height and width of every sample, int32 [N, 2], without parsing their lines.

        Raises:
            DataError: the lines of a shard are damaged.
        """
        shapes = np.empty((len(self), 2), dtype=np.int32)
        for shard, (start, end) in enumerate(pairwise(self._starts)):
            block = self._checked_block(shard)
            for column, pattern in enumerate((_HEIGHT, _WIDTH)):
                found = pattern.findall(block)
                if len(found) != end - start:  # not the layout that `write_index` gives its lines
                    rows = self.rows(shard)
                    shapes[start:end] = [(row.height, row.width) for row in rows]
                    break
                shapes[start:end, column] = np.array(found).astype(np.int32)
        return shapes

    def _present_state(self) -> tuple[int, int]:
        if isinstance(self._file, bytes):
            return 0, 0
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def _checked_block(self, shard: int) -> bytes:
        """All lines of a shard, once their digest fits."""
        entry = self.shards[shard]
        block = self._read(self._blocks[shard], entry.index_bytes)
        if files.sha256_bytes(block) != entry.index_sha256:
            raise self._damage(f"the lines of shard {entry.file} were changed")
        return block

    def _checked_lines(self, shard: int) -> np.ndarray:
        """Ends of a shard's lines, counted from the start of its block."""
        entry, block = self.shards[shard], self._checked_block(shard)
        ends = np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n"))
        if len(ends) + 1 != entry.samples:
            raise self._damage(f"shard {entry.file} has another number of lines")
        return np.append(ends, len(block))

    def _parsed_row(self, line: bytes, shard: int) -> SampleRow:
        try:
            value = json.loads(line)
            mask = value.pop("mask")
            row = SampleRow(**value, mask=None if mask is None else MaskPlace(*mask))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise self._damage(f"a line of shard {self.shards[shard].file} is no sample") from error
        places = [(row.offset, row.size)] + ([(row.mask.offset, row.mask.size)] if row.mask else [])
        numbers = [row.width, row.height, *(number for place in places for number in place)]
        if not (
            isinstance(row.key, str)
            and fits_a_line(row.key)
            and isinstance(row.sha256, str)
            and (row.mask is None or isinstance(row.mask.sha256, str))
            and (row.caption is None or (isinstance(row.caption, str) and _is_text(row.caption)))
            and all(type(number) is int and number >= 0 for number in numbers)
            and all(offset + size <= self.shards[shard].bytes for offset, size in places)
            and 0 < row.width < _SIDE_LIMIT
            and 0 < row.height < _SIDE_LIMIT
        ):
            raise self._damage(f"impossible values for {str(row.key)[:80]!r}")
        return row

    def _damage(self, what: str) -> DataError:
        return DataError(f"{self.where}: damaged index ({what}); {_REPAIR}")

    def _open(self) -> tuple[io.FileIO | bytes, int]:
        """The index, as a file in the layout or laid out in memory, and its length."""
        try:
            if not self.path.is_file():  # a named pipe would wait for ever
                raise DataError(f"{self.where}: no such index; `disttrain shard SRC DST` makes one")
            handle = io.FileIO(self.path)
            size = os.fstat(handle.fileno()).st_size
            start = max(0, size - len(_TAIL))
            ends = handle.read(len(_HEAD)), os.pread(handle.fileno(), len(_TAIL), start)
        except OSError as error:
            raise DataError(f"{self.where}: {error.strerror or error}") from error
        if ends == (_HEAD, _TAIL):
            return handle, size
        data = self._laid_out()
        return data, len(data)

    def _read(self, start: int, size: int) -> bytes:
        # Not mapped into memory: a file that somebody cuts would then kill the process.
        if isinstance(self._file, bytes):
            return self._file[start : start + size]
        try:
            return os.pread(self._file.fileno(), size, start)
        except OSError as error:
            raise DataError(f"{self.where}: {error.strerror or error}") from error

    def _laid_out(self) -> bytes:
        """The canonical bytes of an index that somebody formatted in another way."""
        try:
            value = files.read_json(self.path, REFORMATTED_LIMIT)
        except DataError as error:
            raise DataError(str(error).replace(str(self.path), self.where)) from error
        if not isinstance(value, dict) or value.get("format") != "disttrain-shards":
            raise DataError(
                f"{self.where}: not an index of shards; make one with `disttrain shard SRC DST`"
            )
        if value.get("version") != VERSION:
            found = value.get("version")
            raise DataError(f"{self.where}: index version {repr(found)[:20]} is not {VERSION}")
        shards, rows = value.get("shards"), value.get("samples")
        if not isinstance(shards, list) or not isinstance(rows, list):
            raise self._damage("no lists of shards and samples")
        try:
            parts = (b",\n".join(map(_compact, part)) + b"\n" for part in (shards, rows))
            return _HEAD + next(parts) + _MIDDLE + next(parts) + _TAIL
        except (ValueError, RecursionError) as error:
            raise self._damage("not JSON") from error

    def _read_head(self) -> int:
        """Fill `shards`; returns where the samples begin."""
        head, end = b"", -1
        while end < 0:
            piece = self._read(len(head), 2**20 + len(head))
            head += piece
            end = head.find(_MIDDLE, max(0, len(head) - len(piece) - len(_MIDDLE)))
            if end < 0 and (not piece or len(head) > _HEAD_LIMIT):
                raise self._damage("it has no samples, or another layout")
        for line in head[len(_HEAD) : end].split(b"\n")[:-1]:
            try:
                entry = ShardEntry(**json.loads(line.rstrip(b",")))
            except (ValueError, TypeError, RecursionError) as error:
                raise self._damage("a line of its list of shards is no shard") from error
            numbers = (entry.bytes, entry.samples, entry.index_bytes)
            texts = (entry.file, entry.sha256, entry.index_sha256)
            if not (
                all(type(number) is int and 0 < number < _BYTES_LIMIT for number in numbers)
                and entry.samples <= entry.index_bytes
                and all(isinstance(text, str) for text in texts)
                and all(map(_DIGEST.fullmatch, texts[1:]))  # names of files when fetched
                and entry.file.isprintable()
                and fits_a_line(entry.file)
            ):
                raise self._damage("impossible values in its list of shards")
            self.shards.append(entry)
        if not self.shards:
            raise self._damage("no shards")
        return end + len(_MIDDLE)


def _is_text(value: str) -> bool:
    """Whether UTF-8 can hold it: JSON can spell half a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _entry_line(entry: ShardEntry, block: bytes) -> bytes:
    value = asdict(entry)
    value |= {"index_bytes": len(block), "index_sha256": files.sha256_bytes(block)}
    return _compact(value)


def _compact(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
