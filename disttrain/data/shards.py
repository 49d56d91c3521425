"""A folder of pictures -> webdataset tar shards with an index; other people's tars -> an index.

Between the user's pictures and `source.ShardSource`. Invariants: a shard appears under its name
only when complete; its bytes depend on the files that go in and the limits alone; shards that are
there are never overwritten, so the same command continues a cancelled run; `index.json` is written
last. Pictures, captions and metadata go in byte by byte as they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path
from typing import BinaryIO

from braceexpand import braceexpand

from disttrain import files
from disttrain.data import images, tars
from disttrain.data.index import MaskPlace, SampleRow, ShardEntry, ShardIndex, write_index
from disttrain.data.source import (
    CAPTION_LIMIT,
    INDEX_NAME,
    FolderListing,
    check_picture,
    decode_caption,
    list_folder,
    read_bounded,
    refuse_other_size,
)
from disttrain.data.tar_samples import METADATA_LIMIT, index_tar
from disttrain.data.workers import Counter, Progress, Stopped, in_order
from disttrain.errors import DataError


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
    _refuse_equal_keys(listing)
    lock = files.FolderLock(destination)
    try:
        files.remove_temporaries(destination)
        counter = Counter(len(listing.pictures), progress)
        plans = _plans(listing, samples_per_shard, bytes_per_shard)
        names: set[str] = set()

        def work(plan: _Plan) -> tuple[ShardEntry, list[SampleRow]]:
            names.add(plan.name)
            return _finish_shard(plan, destination / plan.name, thorough, counter)

        with closing(in_order(work, plans, workers, counter.stop)) as shards:
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
    counter = Counter(len(paths), progress)
    skipped: list[str] = []
    keys: set[str] = set()
    total = 0

    def work(path: Path) -> tuple[ShardEntry, list[SampleRow], list[str]]:
        found = index_tar(path, index.parent, thorough)
        counter.advance()
        return found

    def usable() -> Iterator[tuple[ShardEntry, list[SampleRow]]]:
        nonlocal total
        with closing(in_order(work, paths, workers, counter.stop)) as found:
            for entry, rows, left_out in found:
                skipped.extend(left_out)
                rows = _with_new_keys(rows, keys, Path(entry.file))
                total += len(rows)
                if rows:
                    yield entry, rows

    write_index(index, usable())
    return IndexReport(index, total, skipped)


def expand_patterns(patterns: Sequence[str]) -> list[Path]:
    """Local tars by path, glob (`tars/*.tar`) or brace list (`tars/{0000..0099}.tar`), in order.

    Raises:
        DataError: a pattern matches nothing, or is no local path.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        if ":" in pattern:
            raise DataError(f"{pattern}: not a local path; copy the tars here first")
        matches = [path for one in braceexpand(pattern) for path in sorted(glob(one))]
        if not matches:
            raise DataError(f"{pattern}: matches no file")
        found |= dict.fromkeys(map(Path, matches))
    return list(found)


def verify(
    index_path: Path, *, workers: int | None = None, progress: Progress | None = None
) -> list[str]:
    """Read every shard of an index; a line for each missing or damaged one and for its samples."""
    try:
        index = ShardIndex(index_path)
    except DataError as error:
        return [str(error)]
    counter = Counter(len(index.shards), progress)

    def work(shard: int) -> list[str]:
        found = _damages(index, shard)
        counter.advance()
        return found

    with closing(in_order(work, range(len(index.shards)), workers, counter.stop)) as found:
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


def _plans(listing: FolderListing, samples_limit: int, bytes_limit: int) -> Iterator[_Plan]:
    """The samples of each shard, in the order of the listing."""
    number, size, samples = 0, len(tars.END), []
    for name in listing.pictures:
        sample = _planned(listing, name)
        try:
            sample_size = sum(
                tars.member_size(f"{sample.key}.{extension}", path.stat().st_size)
                for extension, path in sample.parts
            )
        except OSError as error:
            raise DataError(f"{error.filename}: {error.strerror}") from error
        if samples and (len(samples) == samples_limit or size + sample_size > bytes_limit):
            yield _Plan(f"shard-{number:06d}.tar", samples)
            number, size, samples = number + 1, len(tars.END), []
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
    members = [(end, folder / parts[end]) for end in sorted(parts)]
    return _PlannedSample(_key(name), members, folder / name)


def _key(name: str) -> str:
    """Key of a picture's sample: its stem without dots, because webdataset ends a key at a dot."""
    return os.path.splitext(name)[0].replace(".", "_")


def _refuse_equal_keys(listing: FolderListing) -> None:
    names: dict[str, str] = {}
    for name in listing.pictures:
        other = names.setdefault(_key(name), name)
        if other != name:
            raise DataError(
                f"{listing.folder}: {other} and {name} would both be {_key(name)!r} in a shard, "
                "where a key has no dots; rename one"
            )


def _finish_shard(
    plan: _Plan, path: Path, thorough: bool, counter: Counter
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
    plan: _Plan, write: Callable[[bytes], object], thorough: bool, counter: Counter
) -> list[SampleRow]:
    """Hand the bytes of a tar to `write` piece by piece; returns the rows of its samples."""
    position = 0
    rows: list[SampleRow] = []
    for sample in plan.samples:
        if counter.stop.is_set():
            raise Stopped
        width = height = 0
        caption, mask, picture = None, None, (0, 0, "")
        mask_size = None
        for extension, path in sample.parts:
            data = _part(extension, path)
            header = tars.member_header(f"{sample.key}.{extension}", len(data))
            place = (position + len(header), len(data))
            if path == sample.picture:
                width, height = check_picture(data, str(path), thorough)
                picture = (*place, files.sha256_bytes(data))
            elif extension == "mask.png":
                mask_size = check_picture(data, str(path), thorough)
                mask = MaskPlace(*place, files.sha256_bytes(data))
            elif extension == "txt":
                caption = decode_caption(data, str(path))
            for piece in (header, data, tars.padding(len(data))):
                write(piece)
                position += len(piece)
        refuse_other_size(mask_size, (width, height), str(sample.picture))
        rows.append(SampleRow(sample.key, *picture, width, height, caption, mask))
        counter.advance()
    write(tars.END)
    return rows


def _part(extension: str, path: Path) -> bytes:
    """Bytes of a member to be, within the limit of its kind."""
    limits = {"txt": CAPTION_LIMIT, "json": METADATA_LIMIT}
    return read_bounded(path, limits.get(extension, images.MAX_BYTES))


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
    name = tar.with_suffix("").as_posix()
    result = [replace(row, key=f"{name}/{row.key}") if row.key in keys else row for row in rows]
    for row in result:
        if row.key in keys:
            raise DataError(f"{tar}: key {row.key!r} occurs twice; is the tar given twice?")
        keys.add(row.key)
    return result


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
