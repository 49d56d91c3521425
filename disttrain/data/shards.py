"""A folder of pictures -> webdataset tar shards with an index.

Between the user's pictures and `shard_source.py`. Invariants: a shard appears under its name only
when complete; its bytes depend on the files that go in and the limits alone; shards that are there
are never overwritten, so the same command continues a cancelled run; `index.json` is written last.
Pictures, captions and metadata go in byte by byte as they are, and are hashed as they go.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from disttrain import files
from disttrain.data import images, tars
from disttrain.data.folder import (
    CAPTION_LIMIT,
    FolderListing,
    check_picture,
    decode_caption,
    list_folder,
    refuse_other_size,
)
from disttrain.data.index import MaskPlace, SampleRow, ShardEntry, write_index
from disttrain.data.indexing import IndexReport, expand_patterns, index_tars, verify
from disttrain.data.plain_files import open_plain, read_bounded, writing
from disttrain.data.source import INDEX_NAME
from disttrain.data.tar_samples import METADATA_LIMIT
from disttrain.data.workers import Counter, Progress, Stopped, in_order
from disttrain.errors import DataError

__all__ = ["IndexReport", "expand_patterns", "index_tars", "verify", "write_shards"]


def write_shards(
    source: Path,
    destination: Path,
    *,
    samples_per_shard: int = 1000,
    bytes_per_shard: int = 256 * 10**6,
    workers: int | None = None,
    thorough: bool = True,
    caption_column: str = "",
    progress: Progress | None = None,
) -> Path:
    """Pack the pictures of a folder into `shard-000000.tar` and so on, then write `index.json`.

    Args:
        samples_per_shard, bytes_per_shard: a shard is closed before either is exceeded; a sample
            larger than the limit has a shard of its own.
        workers: shards in the making at once; None for one a core, 8 at most.
        thorough: decode every picture, not just its header.
        caption_column: see `metadata.read_captions`; a sample with a .txt of its own keeps that.
        progress: told samples done and in all.

    Returns:
        The path of the index.

    Raises:
        DataError: a picture or caption cannot be read (finished shards stay), or the destination
            holds other shards or cannot be written.
        UserError: another process is writing there.
    """
    assert samples_per_shard > 0
    assert bytes_per_shard > 0
    listing = list_folder(source, caption_column)
    if not listing.pictures:
        raise DataError(f"{source}: no pictures to pack; give a folder of pictures")
    if destination.resolve() == source.resolve():
        raise DataError(f"{destination}: shards need a folder of their own")
    _refuse_equal_keys(listing)
    with writing(destination):
        lock = files.FolderLock(destination)
    try:
        _remove_temporaries(destination)
        counter = Counter(len(listing.pictures), progress)
        plans = _plans(listing, samples_per_shard, bytes_per_shard)
        names: set[str] = set()

        def work(plan: _Plan) -> tuple[ShardEntry, list[SampleRow]]:
            names.add(plan.name)
            return _finish_shard(plan, destination / plan.name, thorough, counter)

        with writing(destination), closing(in_order(work, plans, workers, counter.stop)) as shards:
            write_index(destination / INDEX_NAME, _without_strangers(shards, destination, names))
    finally:
        lock.release()
    return destination / INDEX_NAME


def _remove_temporaries(folder: Path) -> None:
    """Clear what a killed run left; the folder may hold other programs' files too."""
    for pattern in (".shard-*.tar.*.tmp", f".{INDEX_NAME}.*.tmp"):
        for left in folder.glob(pattern):
            left.unlink(missing_ok=True)


@dataclass(frozen=True)
class _PlannedSample:
    """A sample to pack: its key and (extension, content) of each member, in the order of the tar.

    Content is a file, or bytes that come from none.
    """

    key: str
    parts: list[tuple[str, Path | bytes]]
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
                tars.member_size(f"{sample.key}.{extension}", _size(content))
                for extension, content in sample.parts
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
    folder = listing.folder
    parts: dict[str, Path | bytes] = {extension: folder / name}
    if name in listing.texts:
        parts["txt"] = listing.texts[name].encode()
    companions = {"txt": listing.captions, "json": listing.metadata, "mask.png": listing.masks}
    parts |= {end: folder / found[stem] for end, found in companions.items() if stem in found}
    return _PlannedSample(_key(name), sorted(parts.items(), key=_extension), folder / name)


def _extension(part: tuple[str, Path | bytes]) -> str:
    return part[0]


def _size(content: Path | bytes) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)


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
    if os.path.lexists(path):
        try:
            with os.fdopen(open_plain(path), "rb") as existing:
                writer = files.HashingWriter(_comparing(existing, path))
                rows = _pack(plan, writer, False, counter)
                if existing.read(1):
                    raise _other_content(path)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}") from error
    else:
        with files.atomic_writer(path) as handle:
            writer = files.HashingWriter(handle.write)
            rows = _pack(plan, writer, thorough, counter)
    return ShardEntry(path.name, writer.digest, writer.size, len(rows)), rows


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
    plan: _Plan, writer: files.HashingWriter, thorough: bool, counter: Counter
) -> list[SampleRow]:
    """Hand the bytes of a tar to `writer` piece by piece; returns the rows of its samples."""
    rows: list[SampleRow] = []
    for sample in plan.samples:
        if counter.stop.is_set():
            raise Stopped
        width = height = 0
        caption, mask, picture = None, None, (0, 0, "")
        mask_size = None
        for extension, path in sample.parts:
            data = _part(extension, path) if isinstance(path, Path) else path
            header = tars.member_header(f"{sample.key}.{extension}", len(data))
            place = (writer.size + len(header), len(data))
            if path == sample.picture:
                width, height = check_picture(data, str(path), thorough)
                picture = (*place, files.sha256_bytes(data))
            elif extension == "mask.png":
                mask_size = check_picture(data, str(path), thorough)
                mask = MaskPlace(*place, files.sha256_bytes(data))
            elif extension == "txt":
                caption = decode_caption(data, str(path) if data is not path else sample.key)
            for piece in (header, data, tars.padding(len(data))):
                writer.write(piece)
        refuse_other_size(mask_size, (width, height), str(sample.picture))
        rows.append(SampleRow(sample.key, *picture, width, height, caption, mask))
        counter.advance()
    writer.write(tars.END)
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
