"""Other people's webdataset tars -> an index; an index -> what is damaged in its shards.

Between tars that exist, here or behind URLs, and `shard_source.py`. Invariant: each tar is read
once, front to back, and none is changed.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from glob import glob
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit

from braceexpand import braceexpand

from disttrain import files
from disttrain.data import images, storage
from disttrain.data.index import SampleRow, ShardEntry, ShardIndex, write_index
from disttrain.data.plain_files import writing
from disttrain.data.shard_cache import ShardCache
from disttrain.data.tar_samples import CAPTION_KEY, TarReader
from disttrain.data.workers import Counter, Progress, in_order
from disttrain.errors import DataError

__all__ = ["CAPTION_KEY", "IndexReport", "expand_patterns", "index_tars", "verify"]

MOST_TARS = 1_000_000
_TOO_MANY = f"more than {MOST_TARS} tars; write several indexes"


@dataclass(frozen=True)
class IndexReport:
    """What `index_tars` found. `skipped` has a line for each sample that cannot be used."""

    path: Path
    samples: int
    skipped: list[str]


def index_tars(
    places: Sequence[Path | str],
    index: Path,
    *,
    workers: int | None = None,
    thorough: bool = False,
    caption_key: str = CAPTION_KEY,
    progress: Progress | None = None,
) -> IndexReport:
    """Write an index of webdataset tars that exist, whoever made them.

    A sample is a run of members with one key. Its picture is the member with a picture's extension,
    its caption the `.txt` member, or a key of the `.json` one, its mask `.mask.png`. Nothing else
    is looked at, nothing is unpickled. A key that an earlier tar holds too gets the name of its tar
    in front.

    Args:
        places: paths, or URLs as `expand_patterns` gives them.
        workers: tars read at once; None for one a core, 8 at most.
        thorough: decode every picture, not just its header.
        caption_key: which key of a `.json` member is the caption.
        progress: told tars done and in all.

    Raises:
        DataError: a tar is missing, damaged or unsafe (see `tars.walk`), none has a picture, or the
            index cannot be written.
    """
    counter = Counter(len(places), progress)
    reader = TarReader(index.parent, thorough, caption_key, counter.stop)
    skipped: list[str] = []
    keys: set[str] = set()
    total = 0

    def work(place: Path | str) -> tuple[ShardEntry, list[SampleRow], list[str]]:
        found = reader.index_tar(place)
        counter.advance()
        return found

    def usable() -> Iterator[tuple[ShardEntry, list[SampleRow]]]:
        nonlocal total
        with closing(in_order(work, places, workers, counter.stop)) as found:
            for entry, rows, left_out in found:
                skipped.extend(left_out)
                rows = _with_new_keys(rows, keys, entry.file)
                total += len(rows)
                if rows:
                    yield entry, rows

    with writing(index):
        write_index(index, usable())
    return IndexReport(index, total, skipped)


def expand_patterns(patterns: Sequence[str]) -> list[Path | str]:
    """Tars by path or URL, glob (`tars/*.tar`) or brace list (`tars/{0000..0099}.tar`), in order.

    Raises:
        DataError: a pattern matches nothing, or is of a place that is not read or cannot be listed.
    """
    found: dict[Path | str, None] = {}
    for pattern in patterns:
        ranges = re.findall(r"\{(-?[0-9]+)\.\.(-?[0-9]+)", pattern)
        if any(
            max(len(first), len(last)) > 12 or abs(int(last) - int(first)) >= MOST_TARS
            for first, last in ranges
        ):
            raise DataError(f"{pattern}: {_TOO_MANY}")  # braceexpand would list them all first
        try:
            names = list(islice(braceexpand(pattern), MOST_TARS + 1))
        except ValueError as error:
            raise DataError(
                f"{pattern}: {error}; put a backslash before a brace to keep"
            ) from error
        if len(names) > MOST_TARS:
            raise DataError(f"{pattern}: {_TOO_MANY}")
        matches = [place for name in names for place in _matches(name)]
        if not matches:
            raise DataError(f"{pattern}: matches no file")
        found |= dict.fromkeys(matches)
    return list(found)


def _matches(name: str) -> list[Path | str]:
    place = storage.place_of(name)
    if isinstance(place, str):
        return list(storage.expand(place))
    return [Path(path) for path in sorted(glob(str(place)))]


def verify(
    where: str | Path, *, workers: int | None = None, progress: Progress | None = None
) -> list[str]:
    """Read every shard of an index; a line for each missing or damaged one and for its samples."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            place = storage.place_of(where)
            if isinstance(place, str):
                index = ShardIndex(ShardCache(Path(folder), 0).index(place), place)
            else:
                index = ShardIndex(place)
        except DataError as error:
            return [str(error)]
        counter = Counter(len(index.shards), progress)

        def work(shard: int) -> list[str]:
            found = _damages(index, shard)
            counter.advance()
            return found

        with closing(in_order(work, range(len(index.shards)), workers, counter.stop)) as found:
            return [line for lines in found for line in lines]


def _with_new_keys(rows: list[SampleRow], keys: set[str], tar: str) -> list[SampleRow]:
    """The rows with keys that no tar before used; `keys` is extended by them."""
    name = "".join(urlsplit(tar)[1:3]) if "://" in tar else tar
    name = Path(name).with_suffix("").as_posix()
    result = [replace(row, key=f"{name}/{row.key}") if row.key in keys else row for row in rows]
    for row in result:
        if row.key in keys:
            raise DataError(f"{tar}: key {row.key!r} occurs twice; is the tar given twice?")
        keys.add(row.key)
    return result


def _damages(index: ShardIndex, shard: int) -> list[str]:
    """A line for each thing wrong with one shard."""
    place, entry = index.places[shard], index.shards[shard]
    try:
        rows = index.rows(shard)
        if isinstance(place, Path) and not place.is_file():
            return [f"{place}: missing"]
        digest, size = storage.attempts(place, lambda: _digest_at(place))
        if digest == entry.sha256:
            return []
        found: list[str] = []
        if size != entry.bytes:
            found.append(f"{place}: {size} bytes instead of {entry.bytes}")
        if isinstance(place, str):
            return found or [f"{place}: damaged (its digest does not fit the index)"]
        with place.open("rb") as handle:
            found += [f"{place}: {line}" for line in _damaged_samples(handle.fileno(), rows)]
    except DataError as error:
        return [str(error)]
    except OSError as error:
        return [f"{place}: {error.strerror or error}"]
    return found or [f"{place}: damaged outside of its pictures"]


def _digest_at(place: Path | str) -> tuple[str, int]:
    """Digest and size of what lies at a place, read once."""
    with storage.reading(place) as handle:
        reader = files.HashingReader(handle)
        while reader.read(2**20):
            pass
    return reader.digest, reader.size


def _damaged_samples(descriptor: int, rows: list[SampleRow]) -> Iterator[str]:
    for row in rows:
        places = [("picture", row)] + ([("mask", row.mask)] if row.mask else [])
        for what, place in places:
            data = os.pread(descriptor, min(place.size, images.MAX_BYTES + 1), place.offset)
            if files.sha256_bytes(data) != place.sha256:
                yield f"{row.key}: {what} damaged"
