"""Where pictures come from: a folder, or shards through their index; both look the same from here.

Between the files of a subject and latents or loader. Invariant: `read(n)` returns exactly the bytes
whose sha256 is `records[n].digest`, or raises DataError; the order of records is the same on every
machine, and `digest` changes when any picture, caption, mask or key does.
"""

from __future__ import annotations

import os
import re
import stat
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, overload

from disttrain import files
from disttrain.data import images
from disttrain.data.index import SampleRow, ShardIndex
from disttrain.errors import DataError

INDEX_NAME = "index.json"
CAPTION_LIMIT = 2**20
DECODED_AT_OPENING = 300
"""Folders of up to so many pictures are decoded once when opened, larger ones by header only."""
_MASK_SUFFIX = ".mask.png"
_COMPANION_SUFFIXES = frozenset({".txt", ".md", ".json", ".jsonl", ".csv", ".yaml", ".yml"})
_OPEN_SHARDS = 64
_THREADS = min(4, os.cpu_count() or 1)  # each may hold a decoded picture of the largest size


@dataclass(frozen=True, slots=True)
class SampleRecord:
    """What is known of a sample without reading its picture.

    `digest` is the sha256 of the picture file; `width` and `height` are pixels after orientation.
    """

    key: str
    digest: str
    caption: str | None
    width: int
    height: int

    @property
    def stem(self) -> str:
        """The key without folders: the file name that "filewords" prompts are made of."""
        return self.key.rpartition("/")[2]


class Source(Protocol):
    """A fixed sequence of pictures. Safe to use from several threads and to pickle."""

    @property
    def records(self) -> Sequence[SampleRecord]:
        """The samples in their fixed order."""
        ...

    @property
    def digest(self) -> str:
        """Hex sha256 of everything the samples hold."""
        ...

    @property
    def where(self) -> str:
        """The path, for messages."""
        ...

    @property
    def ignored(self) -> Sequence[str]:
        """Names that were left out though somebody may have meant them as pictures."""
        ...

    def read(self, index: int) -> bytes:
        """Picture file of a sample; DataError if it is not what was indexed."""
        ...

    def read_mask(self, index: int) -> bytes | None:
        """Mask file of a sample, None if it has none; DataError as `read`."""
        ...


def open_source(path: str | Path) -> Source:
    """Open a folder of pictures, an `index.json`, or a folder that holds one beside its shards.

    Raises:
        DataError: missing, empty, of another kind, or with a picture that cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        listing = list_folder(path)
        if not listing.pictures and (path / INDEX_NAME).is_file():
            return ShardSource(path / INDEX_NAME)
        return FolderSource(listing)
    if not path.exists():
        raise DataError(f"{path}: no such folder or index; give a folder of pictures")
    if path.suffix.lower() == ".json":
        return ShardSource(path)
    hint = "give its index.json (`disttrain shard` makes one)" if path.suffix == ".tar" else ""
    raise DataError(f"{path}: {hint or 'not a folder of pictures and not an index.json'}")


@dataclass(frozen=True)
class FolderListing:
    """Files of a folder by their part: names in `pictures` order, others by the picture's stem."""

    folder: Path
    pictures: list[str]
    captions: dict[str, str]
    masks: dict[str, str]
    metadata: dict[str, str]
    ignored: list[str]


def list_folder(folder: Path) -> FolderListing:
    """Sort the files directly in `folder` into pictures, in natural order, and what goes with them.

    Hidden files are passed over. `ignored` names sub-folders, files of unknown kinds, and masks
    without a picture.

    Raises:
        DataError: the folder cannot be read, a name is not UTF-8, or two pictures share a stem.
    """
    pictures: dict[str, str] = {}
    others: dict[str, dict[str, str]] = {".txt": {}, ".json": {}, _MASK_SUFFIX: {}}
    ignored: list[str] = []
    for name, is_file in _entries(folder):
        stem, suffix = os.path.splitext(name)
        suffix = suffix.lower()
        if not is_file:
            ignored.append(name)
        elif name.lower().endswith(_MASK_SUFFIX):
            others[_MASK_SUFFIX][name[: -len(_MASK_SUFFIX)]] = name
        elif suffix in images.SUFFIXES:
            if stem in pictures:
                raise DataError(
                    f"{folder}: {pictures[stem]} and {name} share the name {stem!r}; rename one"
                )
            pictures[stem] = name
        elif suffix in others:
            others[suffix][stem] = name
        elif suffix not in _COMPANION_SUFFIXES:
            ignored.append(name)
    names = [pictures[stem] for stem in sorted(pictures, key=_natural)]
    texts, metadata, masks = others[".txt"], others[".json"], others[_MASK_SUFFIX]
    ignored += [name for stem, name in masks.items() if stem not in pictures]
    return FolderListing(folder, names, texts, masks, metadata, sorted(ignored, key=_natural))


def decode_caption(data: bytes, where: str) -> str:
    """Text of a caption file without surrounding white space.

    Raises:
        DataError: not UTF-8.
    """
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error


def read_bounded(path: Path, limit: int) -> bytes:
    """Bytes of a plain file of at most `limit` bytes.

    Raises:
        DataError: missing, unreadable, not a plain file, or too large.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # before opening: a named pipe would wait for ever
            raise DataError(f"{path}: not a plain file; remove it")
        if status.st_size > limit:
            raise DataError(f"{path}: {status.st_size} bytes, the limit is {limit}")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


class FolderSource:
    """The pictures directly in a folder, with same-stem .txt captions and .mask.png masks.

    Every picture is read once at opening: its digest is taken, its header checked, and in folders
    of up to `DECODED_AT_OPENING` pictures it is decoded, so that a broken one is found now.

    Raises:
        DataError: no picture, or one that cannot be read, named by its path.
    """

    def __init__(self, listing: FolderListing) -> None:
        self.where = str(listing.folder)
        self.ignored = listing.ignored
        self._listing = listing
        if not listing.pictures:
            suffixes = " ".join(sorted(images.SUFFIXES))
            other = f" (other files: {', '.join(listing.ignored[:3])})" if listing.ignored else ""
            raise DataError(f"{self.where}: no pictures; put {suffixes} files there{other}")
        with ThreadPoolExecutor(_THREADS) as pool:
            found = list(pool.map(self._look_at, listing.pictures))
        self.records = [record for record, _ in found]
        self._mask_digests = [mask for _, mask in found]
        self.digest = files.digest_of([[r.key, r.digest, r.caption, mask] for r, mask in found])

    def read(self, index: int) -> bytes:
        """Picture file of a sample; DataError if it changed since opening."""
        path = self._listing.folder / self._listing.pictures[index]
        return self._unchanged(path, self.records[index].digest)

    def read_mask(self, index: int) -> bytes | None:
        """Mask file of a sample, None if it has none; DataError if it changed since opening."""
        digest = self._mask_digests[index]
        if digest is None:
            return None
        name = self._listing.masks[self.records[index].key]
        return self._unchanged(self._listing.folder / name, digest)

    def _look_at(self, name: str) -> tuple[SampleRecord, str | None]:
        listing, stem = self._listing, os.path.splitext(name)[0]
        path = listing.folder / name
        data = read_bounded(path, images.MAX_BYTES)
        thorough = len(listing.pictures) <= DECODED_AT_OPENING
        width, height = check_picture(data, str(path), thorough)
        caption = listing.captions.get(stem)
        text = None
        if caption is not None:
            caption_path = listing.folder / caption
            text = decode_caption(read_bounded(caption_path, CAPTION_LIMIT), str(caption_path))
        mask = None
        if stem in listing.masks:
            mask_path = listing.folder / listing.masks[stem]
            mask_data = read_bounded(mask_path, images.MAX_BYTES)
            mask_size = check_picture(mask_data, str(mask_path), thorough)
            refuse_other_size(mask_size, (width, height), str(path))
            mask = files.sha256_bytes(mask_data)
        return SampleRecord(stem, files.sha256_bytes(data), text, width, height), mask

    @staticmethod
    def _unchanged(path: Path, digest: str) -> bytes:
        data = read_bounded(path, images.MAX_BYTES)
        if files.sha256_bytes(data) != digest:
            raise DataError(f"{path}: changed since the run began; start the run again")
        return data


class ShardSource:
    """The samples of tar shards, each read by one seek through their index (`data/index.py`).

    Raises:
        DataError: the index is missing or damaged. Shards are looked at when they are read.
    """

    ignored: Sequence[str] = ()

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        self.index = ShardIndex(path)
        self.digest = self.index.digest
        self.records: Sequence[SampleRecord] = _Records(self.index)
        self._handles: OrderedDict[int, _Handle] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[ShardSource], tuple[Path]]:
        return ShardSource, (self.index.path,)

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
        where = f"{self.index.shard_path(shard)}: {row.key}"
        if size > images.MAX_BYTES:
            raise DataError(f"{where}: {size} bytes, the limit is {images.MAX_BYTES}")
        try:
            handle = self._handle(shard)  # held until the read is over
            data = os.pread(handle.descriptor, size, offset)
        except OSError as error:
            raise DataError(f"{where}: {error.strerror or error}") from error
        if files.sha256_bytes(data) != digest:
            raise DataError(
                f"{where}: damaged (its digest does not fit the index); "
                "see `disttrain shard --verify`"
            )
        return data

    def _handle(self, shard: int) -> _Handle:
        with self._lock:
            if shard not in self._handles:
                self._handles[shard] = _Handle(self.index.shard_path(shard))
                if len(self._handles) > _OPEN_SHARDS:
                    self._handles.popitem(last=False)
            self._handles.move_to_end(shard)
            return self._handles[shard]


def check_picture(data: bytes, where: str, thorough: bool) -> tuple[int, int]:
    """Width and height of a picture after orientation; `thorough` decodes it.

    Raises:
        DataError: it cannot be read.
    """
    if not thorough:
        return images.probe(data, where)
    height, width, _ = images.decode(data, where).pixels.shape
    return width, height


def refuse_other_size(mask: tuple[int, int] | None, picture: tuple[int, int], where: str) -> None:
    """DataError unless a mask, where there is one, has the width and height of its picture."""
    if mask is not None and mask != picture:
        raise DataError(
            f"{where}: its mask has {mask[0]} x {mask[1]} pixels, the picture "
            f"{picture[0]} x {picture[1]}; make them equal"
        )


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

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        # Without O_NONBLOCK, opening a named pipe that somebody put there would wait for ever.
        self.descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(self.descriptor).st_mode):
            raise OSError(f"{path} is not a plain file")

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def _entries(folder: Path) -> list[tuple[str, bool]]:
    """Names directly in `folder` that are not hidden, sorted, and whether each is a file.

    A link that leads nowhere counts as one: opening it will say so.
    """
    try:
        with os.scandir(folder) as entries:
            shown = [entry for entry in entries if not entry.name.startswith(".")]
            found = [
                (entry.name, entry.is_file() or (entry.is_symlink() and not entry.is_dir()))
                for entry in shown
            ]
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror or error}") from error
    for name, _ in found:
        if not name.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in name):
            raise DataError(f"{folder}: the file name {name!a} is not UTF-8; rename it")
    return sorted(found)


def _natural(name: str) -> tuple[list[str | int], str]:
    """Sort key that puts "fox-2" before "fox-10"; the name itself breaks ties."""
    parts = re.split(r"([0-9]+)", name.lower())
    return [int(part) if number % 2 else part for number, part in enumerate(parts)], name
