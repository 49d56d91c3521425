"""A folder of pictures -> webdataset tar shards with an index; other people's tars -> an index.

Between the user's pictures and `source.ShardSource`. Invariants: a shard appears under its name only
when complete; its bytes depend on the pictures, captions and limits alone; files that are there are
never overwritten, so a cancelled run is continued by the same command; `index.json` is written last.
Pictures, captions and metadata go in byte by byte as they are.
"""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, TypeVar

from disttrain import files
from disttrain.data import images, tars
from disttrain.data.index import MaskPlace, SampleRow, ShardEntry, ShardIndex, write_index
from disttrain.data.source import (
    CAPTION_LIMIT,
    INDEX_NAME,
    FolderListing,
    check_picture,
    list_folder,
    read_caption,
    read_picture_file,
)
from disttrain.errors import DataError

METADATA_LIMIT = 16 * 2**20
Progress = Callable[[int, int], None]
"""Called with (done, total); never by two threads at once."""
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class IndexReport:
    """What `index_tars` found. `skipped` has a line for each sample that cannot be used."""

    path: Path
    samples: int
    skipped: list[str]


def write_shards(
    source: Path,
    destination: Path,
    *,
    samples_per_shard: int = 1000,
    bytes_per_shard: int = 256 * 2**20,
    workers: int | None = None,
    thorough: bool = True,
    progress: Progress | None = None,
) -> Path:
    """Pack the pictures of a folder into `shard-000000.tar` and so on, then write `index.json`.

    Args:
        samples_per_shard, bytes_per_shard: a shard is closed before either is exceeded; a sample
            larger than the limit has a shard of its own.
        workers: shards in the making at once; None for one a core, 8 at most.
        thorough: decode every picture, not just its header.
        progress: told samples done and in all.

    Returns:
        The path of the index.

    Raises:
        DataError: a picture or caption cannot be read (finished shards stay), or the destination
            holds other shards.
        UserError: another process is writing there.
    """
    assert samples_per_shard > 0
    assert bytes_per_shard > 0
    listing = list_folder(source)
    if not listing.pictures:
        raise DataError(f"{source}: no pictures to pack; give a folder of pictures")
    if destination.resolve() == source.resolve():
        raise DataError(f"{destination}: shards need a folder of their own")
    lock = files.FolderLock(destination)
    try:
        files.remove_temporaries(destination)
        counter = _Counter(len(listing.pictures), progress)
        plans = _plans(listing, samples_per_shard, bytes_per_shard)
        names: set[str] = set()

        def work(plan: _Plan) -> tuple[ShardEntry, list[SampleRow]]:
            names.add(plan.name)
            return _finish_shard(plan, destination / plan.name, thorough, counter)

        with closing(_in_order(work, plans, workers, counter.stop)) as shards:
            write_index(destination / INDEX_NAME, _without_strangers(shards, destination, names))
    finally:
        lock.release()
    return destination / INDEX_NAME


def index_tars(
    paths: Sequence[Path],
    index: Path,
    *,
    workers: int | None = None,
    thorough: bool = False,
    progress: Progress | None = None,
) -> IndexReport:
    """Write an index of webdataset tars that exist, whoever made them.

    A sample is a run of members with one key. Its picture is the member with a picture's extension,
    its caption the `.txt` member, or "caption" in the `.json` one, its mask `.mask.png`. Nothing
    else is read, nothing is unpickled. A key that an earlier tar holds too gets the name of its tar
    in front.

    Args:
        thorough: decode every picture, not just its header.
        progress: told tars done and in all.

    Raises:
        DataError: a tar is missing, damaged or unsafe (see `tars.walk`), or none has a picture.
    """
    counter = _Counter(len(paths), progress)
    skipped: list[str] = []
    keys: set[str] = set()
    total = 0

    def work(path: Path) -> tuple[ShardEntry, list[SampleRow], list[str]]:
        found = _index_tar(path, index.parent, thorough)
        counter.advance()
        return found

    def usable() -> Iterator[tuple[ShardEntry, list[SampleRow]]]:
        nonlocal total
        with closing(_in_order(work, paths, workers, counter.stop)) as found:
            for entry, rows, left_out in found:
                skipped.extend(left_out)
                rows = _with_new_keys(rows, keys, Path(entry.file))
                total += len(rows)
                if rows:
                    yield entry, rows

    write_index(index, usable())
    return IndexReport(index, total, skipped)


def verify(
    index_path: Path, *, workers: int | None = None, progress: Progress | None = None
) -> list[str]:
    """Read every shard of an index; a line for each that is missing or damaged, with its samples."""
    try:
        index = ShardIndex(index_path)
    except DataError as error:
        return [str(error)]
    counter = _Counter(len(index.shards), progress)

    def work(shard: int) -> list[str]:
        found = _damages(index, shard)
        counter.advance()
        return found

    with closing(_in_order(work, range(len(index.shards)), workers, counter.stop)) as found:
        return [line for lines in found for line in lines]


@dataclass(frozen=True)
class _PlannedSample:
    """A sample to pack: its key and (extension, path) of each member, in the order of the tar."""

    key: str
    parts: list[tuple[str, Path]]
    picture: Path


@dataclass(frozen=True)
class _Plan:
    name: str
    samples: list[_PlannedSample]


class _Stopped(Exception):
    """Another worker failed or the user cancelled: leave without finishing the shard."""


class _Counter:
    """Progress of several threads, and their common sign to stop."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.stop = threading.Event()
        self._done, self._total, self._progress = 0, total, progress
        self._lock = threading.Lock()

    def advance(self) -> None:
        with self._lock:
            self._done += 1
            if self._progress is not None:
                self._progress(self._done, self._total)


def _in_order(
    work: Callable[[_Item], _Result],
    items: Iterable[_Item],
    workers: int | None,
    stop: threading.Event,
) -> Iterator[_Result]:
    """Results of `work` in the order of `items`, a bounded number ahead of the consumer."""
    workers = workers or min(8, os.cpu_count() or 1)
    pending: deque[Future[_Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            stop.set()
            for future in pending:
                future.cancel()


def _plans(listing: FolderListing, samples_limit: int, bytes_limit: int) -> Iterator[_Plan]:
    """The samples of each shard, in the order of the listing."""
    number, size, samples = 0, 0, []
    keys: dict[str, str] = {}
    for name in listing.pictures:
        sample = _planned(listing, name)
        if keys.setdefault(sample.key, name) != name:
            raise DataError(
                f"{listing.folder}: {keys[sample.key]} and {name} both become {sample.key!r} in a "
                "shard, where a key has no dots; rename one"
            )
        try:
            sample_size = sum(
                2 * tars.BLOCK + path.stat().st_size for _, path in sample.parts
            )  # at most: header, and padding up to a block
        except OSError as error:
            raise DataError(f"{error.filename}: {error.strerror}") from error
        if samples and (len(samples) == samples_limit or size + sample_size > bytes_limit):
            yield _Plan(f"shard-{number:06d}.tar", samples)
            number, size, samples = number + 1, 0, []
        samples.append(sample)
        size += sample_size
    yield _Plan(f"shard-{number:06d}.tar", samples)


def _planned(listing: FolderListing, name: str) -> _PlannedSample:
    stem, suffix = os.path.splitext(name)
    extension = suffix[1:].lower().replace("jpeg", "jpg")
    parts = {extension: name}
    companions = {"txt": listing.captions, "json": listing.metadata, "mask.png": listing.masks}
    parts |= {end: found[stem] for end, found in companions.items() if stem in found}
    folder = listing.folder
    # webdataset ends a key at its first dot
    key = stem.replace(".", "_")
    return _PlannedSample(key, [(end, folder / parts[end]) for end in sorted(parts)], folder / name)


def _finish_shard(
    plan: _Plan, path: Path, thorough: bool, counter: _Counter
) -> tuple[ShardEntry, list[SampleRow]]:
    """Write a shard, or make sure that the one which is there is the same to the byte."""
    if path.exists():
        with path.open("rb") as existing:
            rows = _pack(plan, _comparing(existing, path), False, counter)
            if existing.read(1):
                raise _other_content(path)
    else:
        with files.atomic_writer(path) as handle:
            rows = _pack(plan, handle.write, thorough, counter)
    return ShardEntry(path.name, files.sha256_file(path), path.stat().st_size, len(rows)), rows


def _comparing(existing: BinaryIO, path: Path) -> Callable[[bytes], None]:
    def compare(data: bytes) -> None:
        if existing.read(len(data)) != data:
            raise _other_content(path)

    return compare


def _other_content(path: Path) -> DataError:
    return DataError(
        f"{path}: already there, and not what this command would write; "
        "give an empty folder, or remove it"
    )


def _pack(
    plan: _Plan, write: Callable[[bytes], object], thorough: bool, counter: _Counter
) -> list[SampleRow]:
    """Hand the bytes of a tar to `write` piece by piece; returns the rows of its samples."""
    position = 0
    rows: list[SampleRow] = []
    for sample in plan.samples:
        if counter.stop.is_set():
            raise _Stopped
        width = height = 0
        caption, mask, picture = None, None, (0, 0, "")
        for extension, path in sample.parts:
            data = _part(extension, path)
            header = tars.member_header(f"{sample.key}.{extension}", len(data))
            place = (position + len(header), len(data))
            if path == sample.picture:
                width, height = check_picture(data, str(path), thorough)
                picture = (*place, files.sha256_bytes(data))
            elif extension == "mask.png":
                check_picture(data, str(path), thorough)
                mask = MaskPlace(*place, files.sha256_bytes(data))
            elif extension == "txt":
                caption = read_caption(path)
            for piece in (header, data, tars.padding(len(data))):
                write(piece)
                position += len(piece)
        rows.append(SampleRow(sample.key, *picture, width, height, caption, mask))
        counter.advance()
    write(tars.END)
    return rows


def _part(extension: str, path: Path) -> bytes:
    """Bytes of a member to be, within the limit of its kind."""
    data = read_picture_file(path)
    limit = {"txt": CAPTION_LIMIT, "json": METADATA_LIMIT}.get(extension)
    if limit is not None and len(data) > limit:
        raise DataError(f"{path}: {len(data)} bytes, the limit is {limit}")
    return data


def _without_strangers(
    shards: Iterable[tuple[ShardEntry, list[SampleRow]]], folder: Path, names: set[str]
) -> Iterator[tuple[ShardEntry, list[SampleRow]]]:
    """Pass `shards` on, then refuse shards in the folder that are not among them."""
    yield from shards
    for path in sorted(folder.glob("shard-*.tar")):
        if path.name not in names:
            raise _other_content(path)


def _with_new_keys(rows: list[SampleRow], keys: set[str], tar: Path) -> list[SampleRow]:
    """The rows with keys that no tar before used; `keys` is extended by them."""
    result = [replace(row, key=f"{tar.stem}/{row.key}") if row.key in keys else row for row in rows]
    for row in result:
        if row.key in keys:
            raise DataError(f"{tar}: key {row.key!r} occurs twice; is the tar given twice?")
        keys.add(row.key)
    return result


def _index_tar(
    path: Path, folder: Path, thorough: bool
) -> tuple[ShardEntry, list[SampleRow], list[str]]:
    """Entry and rows of one tar, and a line for each sample that cannot be used."""
    rows: list[SampleRow] = []
    skipped: list[str] = []
    try:
        digest = files.sha256_file(path)
        with path.open("rb") as handle:
            size = handle.seek(0, os.SEEK_END)
            for key, members in _samples(handle, path):
                try:
                    rows.append(_row(handle, f"{path}: {key}", key, members, thorough))
                except DataError as error:
                    skipped.append(str(error))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    inside = path.resolve().is_relative_to(folder.resolve())
    name = path.resolve().relative_to(folder.resolve()) if inside else path.resolve()
    return ShardEntry(name.as_posix(), digest, size, len(rows)), rows, skipped


def _samples(handle: BinaryIO, path: Path) -> Iterator[tuple[str, dict[str, tars.Member]]]:
    """(key, member by extension) of each sample of a tar."""
    seen: set[str] = set()
    current, members = "", {}
    for member in tars.walk(handle, str(path)):
        split = tars.split_name(member.name)
        if split is None:
            continue
        key, extension = split
        if key != current:
            if members:
                yield current, members
            if key in seen:
                raise DataError(f"{path}: key {key!r} occurs twice; write the shard again")
            seen.add(key)
            current, members = key, {}
        if extension in members:
            raise DataError(f"{path}: {key!r} has two .{extension} members; write the shard again")
        members[extension] = member
    if members:
        yield current, members


def _row(
    handle: BinaryIO, where: str, key: str, members: dict[str, tars.Member], thorough: bool
) -> SampleRow:
    pictures = [end for end in members if f".{end}" in images.SUFFIXES]
    if not pictures:
        ends = {end: os.path.splitext("x." + end)[1] for end in members if end != "mask.png"}
        pictures = [end for end, last in ends.items() if last in images.SUFFIXES]
    if len(pictures) != 1:
        raise DataError(f"{where}: {len(pictures) or 'no'} pictures in one sample; skipped")
    member = members[pictures[0]]
    data = _member(handle, member, images.MAX_BYTES, where)
    width, height = check_picture(data, where, thorough)
    mask = None
    if "mask.png" in members:
        place = members["mask.png"]
        mask_data = _member(handle, place, images.MAX_BYTES, where)
        mask = MaskPlace(place.offset, place.size, files.sha256_bytes(mask_data))
    caption = _caption(handle, members, where)
    digest = files.sha256_bytes(data)
    return SampleRow(key, member.offset, member.size, digest, width, height, caption, mask)


def _caption(handle: BinaryIO, members: dict[str, tars.Member], where: str) -> str | None:
    """The .txt member, else "caption" of the .json one, without surrounding white space."""
    try:
        if "txt" in members:
            text = _member(handle, members["txt"], CAPTION_LIMIT, where).decode("utf-8")
            return text.removeprefix("\ufeff").strip()
        if "json" in members:
            value = json.loads(_member(handle, members["json"], METADATA_LIMIT, where))
            found = value.get("caption") if isinstance(value, dict) else None
            if isinstance(found, str):
                found.encode()  # JSON can spell half a surrogate pair, which is no text
                return found.strip()
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: unreadable caption ({type(error).__name__}); skipped") from error
    return None


def _member(handle: BinaryIO, member: tars.Member, limit: int, where: str) -> bytes:
    if member.size > limit:
        raise DataError(f"{where}: {member.name!r} of {member.size} bytes, the limit is {limit}")
    return os.pread(handle.fileno(), member.size, member.offset)


def _damages(index: ShardIndex, shard: int) -> list[str]:
    """A line for each thing wrong with one shard."""
    path, entry = index.shard_path(shard), index.shards[shard]
    try:
        rows = index.rows(shard)
        if not path.is_file():
            return [f"{path}: missing"]
        if files.sha256_file(path) == entry.sha256:
            return []
        found: list[str] = []
        if path.stat().st_size != entry.bytes:
            found.append(f"{path}: {path.stat().st_size} bytes instead of {entry.bytes}")
        with path.open("rb") as handle:
            for row in rows:
                places = [("picture", row)] + ([("mask", row.mask)] if row.mask else [])
                for what, place in places:
                    data = os.pread(handle.fileno(), place.size, place.offset)
                    if files.sha256_bytes(data) != place.sha256:
                        found.append(f"{path}: {row.key}: {what} damaged")
    except DataError as error:
        return [str(error)]
    except OSError as error:
        return [f"{path}: {error.strerror or error}"]
    return found or [f"{path}: damaged outside of its pictures"]
