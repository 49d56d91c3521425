"""One webdataset tar, whoever made it -> rows of the index.

Between `tars.py` and `shards.index_tars`. Invariants: every picture of the tar is either a row or a
line of what was skipped and why; the tar is read once, front to back, so it may be a stream; memory
holds one sample; nothing is unpickled, and of other members than pictures, masks, `.txt` and
`.json` not a byte is looked at.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from disttrain import files
from disttrain.data import images, storage, tars
from disttrain.data.folder import CAPTION_LIMIT, check_picture, decode_caption, refuse_other_size
from disttrain.data.index import MaskPlace, SampleRow, ShardEntry
from disttrain.data.plain_files import fits_a_line
from disttrain.data.workers import Stopped
from disttrain.errors import DataError

METADATA_LIMIT = 4 * 2**20  # bytes of JSON, which may take over twenty times as many in memory
CAPTION_KEY = "caption"
_Members = dict[str, tars.Member]


@dataclass(frozen=True)
class TarReader:
    """How tars are indexed.

    Args:
        folder: where the index will lie; file names of tars in it are relative to it.
        thorough: decode every picture, not just its header.
        caption_key: key of the `.json` member that holds the caption of a sample without `.txt`.
        stop: when set, reading ends in `Stopped`.
    """

    folder: Path
    thorough: bool
    caption_key: str
    stop: threading.Event

    def index_tar(self, place: Path | str) -> tuple[ShardEntry, list[SampleRow], list[str]]:
        """Entry and rows of one tar, and a line for each sample that cannot be used.

        Raises:
            DataError: the tar is missing, damaged or unsafe, or a key or member occurs twice.
        """
        return storage.attempts(place, lambda: self._read_once(place), self.stop)

    def _read_once(self, place: Path | str) -> tuple[ShardEntry, list[SampleRow], list[str]]:
        rows: list[SampleRow] = []
        skipped: list[str] = []
        try:
            with storage.reading(place) as handle:
                reader = files.HashingReader(handle)
                for key, members in _samples(reader, str(place)):
                    if self.stop.is_set():
                        raise Stopped
                    if not fits_a_line(key):
                        skipped.append(f"{place}: {key!a}: unprintable letters in its key; skipped")
                        continue
                    try:
                        rows.append(self._row(f"{place}: {key}", key, members))
                    except DataError as error:
                        skipped.append(str(error))
                while reader.read(2**20):
                    pass  # what follows the mark of the end belongs to the digest
        except OSError as error:
            raise DataError(f"{place}: {error.strerror or error}") from error
        name = self._name(place)
        return ShardEntry(name, reader.digest, reader.size, len(rows)), rows, skipped

    def _name(self, place: Path | str) -> str:
        """What the index calls a tar."""
        if isinstance(place, str):
            return place
        path, folder = place.resolve(), self.folder.resolve()
        name = (path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix()
        if not name.isprintable():
            raise DataError(f"{name!a}: a file name with unprintable letters; rename it")
        if storage.place_of(name) != Path(name):
            raise DataError(f"{name}: a file name like a URL; rename it")
        return name

    def _row(self, where: str, key: str, members: _Members) -> SampleRow:
        pictures = [end for end in members if f".{end}" in images.SUFFIXES]
        if not pictures:
            pictures = [end for end in members if end != "mask.png" and _is_picture(end)]
        if len(pictures) != 1:
            raise DataError(f"{where}: {len(pictures) or 'no'} pictures in one sample; skipped")
        member = members[pictures[0]]
        data = _content(member, where)
        width, height = check_picture(data, where, self.thorough)
        mask = None
        if "mask.png" in members:
            place = members["mask.png"]
            mask_data = _content(place, where)
            mask_size = check_picture(mask_data, f"{where}.mask.png", self.thorough)
            refuse_other_size(mask_size, (width, height), where)
            mask = MaskPlace(place.offset, place.size, files.sha256_bytes(mask_data))
        caption = self._caption(members, where)
        digest = files.sha256_bytes(data)
        return SampleRow(key, member.offset, member.size, digest, width, height, caption, mask)

    def _caption(self, members: _Members, where: str) -> str | None:
        """The .txt member, else the key of the .json one, without surrounding white space."""
        try:
            if "txt" in members:
                return decode_caption(_content(members["txt"], where), f"{where}.txt")
            if "json" in members:
                value = json.loads(_content(members["json"], where))
                found = value.get(self.caption_key) if isinstance(value, dict) else None
                if isinstance(found, str):
                    size = len(found.encode())  # JSON can spell half a surrogate pair: no text
                    if size > CAPTION_LIMIT:
                        raise DataError(
                            f"{where}: a caption of {size} bytes, the limit is {CAPTION_LIMIT}"
                        )
                    return found.strip()
        except DataError:
            raise
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where}: unreadable caption ({type(error).__name__}); skipped"
            ) from error
        return None


def _samples(reader: files.HashingReader, where: str) -> Iterator[tuple[str, _Members]]:
    """(key, member by extension) of each sample of a tar."""
    seen: set[str] = set()
    current, members = "", {}
    for member in tars.walk(reader, where, _Keeper()):
        split = tars.split_name(member.name)
        if split is None:
            continue
        key, extension = split
        if key != current:
            if members:
                yield current, members
            if key in seen:
                raise DataError(f"{where}: key {key!r} occurs twice; write the shard again")
            seen.add(key)
            current, members = key, {}
        if extension in members:
            raise DataError(f"{where}: {key!r} has two .{extension} members; write the shard again")
        members[extension] = member
    if members:
        yield current, members


class _Keeper:
    """Which members `tars.walk` keeps: those of a sample's parts, up to what one sample may have.

    The sum is bounded too, because a sample may have any number of members named like pictures.
    """

    def __init__(self) -> None:
        self._key, self._kept = "", 0

    def __call__(self, name: str, size: int) -> bool:
        key, extension = tars.split_name(name) or ("", "")
        if key != self._key:
            self._key, self._kept = key, 0
        most = 2 * images.MAX_BYTES + METADATA_LIMIT + CAPTION_LIMIT
        keep = size <= _limit(extension) and self._kept + size <= most
        self._kept += size if keep else 0
        return keep


def _is_picture(extension: str) -> bool:
    return os.path.splitext("x." + extension)[1] in images.SUFFIXES


def _limit(extension: str) -> int:
    """Bytes that a member of a kind may have to be looked at; -1 for other kinds."""
    if _is_picture(extension):
        return images.MAX_BYTES
    return {"txt": CAPTION_LIMIT, "json": METADATA_LIMIT}.get(extension, -1)


def _content(member: tars.Member, where: str) -> bytes:
    if member.data is None:
        limit = _limit(member.name.rpartition(".")[2].lower())
        raise DataError(f"{where}: {member.name!r} of {member.size} bytes, the limit is {limit}")
    return member.data
