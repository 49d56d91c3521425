"""One webdataset tar, whoever made it -> rows of the index.

Between `tars.py` and `shards.index_tars`. Invariant: every picture of the tar is either a row or a
line of what was skipped and why; nothing is unpickled, and of other members than pictures, masks,
`.txt` and `.json` not a byte is looked at.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from disttrain import files
from disttrain.data import images, tars
from disttrain.data.index import MaskPlace, SampleRow, ShardEntry
from disttrain.data.source import CAPTION_LIMIT, check_picture, decode_caption, refuse_other_size
from disttrain.errors import DataError

METADATA_LIMIT = 16 * 2**20


def index_tar(
    path: Path, folder: Path, thorough: bool
) -> tuple[ShardEntry, list[SampleRow], list[str]]:
    """Entry and rows of one tar, and a line for each sample that cannot be used.

    Args:
        folder: where the index will lie; the entry's file name is relative to it where it can be.
        thorough: decode every picture, not just its header.

    Raises:
        DataError: the tar is missing, damaged or unsafe, or a key or member occurs twice.
    """
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
    if not name.as_posix().isprintable():
        raise DataError(f"{name.as_posix()!a}: a file name with unprintable letters; rename it")
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
        mask_size = check_picture(mask_data, f"{where}.mask.png", thorough)
        refuse_other_size(mask_size, (width, height), where)
        mask = MaskPlace(place.offset, place.size, files.sha256_bytes(mask_data))
    caption = _caption(handle, members, where)
    digest = files.sha256_bytes(data)
    return SampleRow(key, member.offset, member.size, digest, width, height, caption, mask)


def _caption(handle: BinaryIO, members: dict[str, tars.Member], where: str) -> str | None:
    """The .txt member, else "caption" of the .json one, without surrounding white space."""
    try:
        if "txt" in members:
            data = _member(handle, members["txt"], CAPTION_LIMIT, where)
            return decode_caption(data, f"{where}.txt")
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
