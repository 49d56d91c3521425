"""A folder of pictures as a source: which files belong to which picture, and what they hold.

Beside `shard_source.py`, under `source.py`; `shards.py` packs what is listed here. Invariant: every
picture was read once when a `FolderSource` is open, so what is wrong with a file is known before
anything is trained, and a file that changes afterwards is refused when it is read.
"""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from disttrain import files
from disttrain.data import images, metadata
from disttrain.data.plain_files import decode_text, fits_a_line, read_bounded
from disttrain.data.samples import SampleRecord, SourceOptions, allowance, refuse_too_many
from disttrain.errors import DataError

CAPTION_LIMIT = 2**16  # bytes; a text encoder looks at a few hundred, but all are cut into tokens
DECODED_AT_OPENING = 300
"""Folders of up to so many pictures are decoded once when opened, larger ones by header only."""
_MASK_SUFFIX = ".mask.png"
_COMPANION_SUFFIXES = frozenset({".txt", ".md", ".json", ".jsonl", ".csv", ".yaml", ".yml"})
_THREADS = min(4, os.cpu_count() or 1)  # each may hold a decoded picture of the largest size


@dataclass(frozen=True)
class FolderListing:
    """Files of a folder by their part: names in `pictures` order, others by the picture's stem.

    `texts` are captions of the metadata file by the name of their picture.
    """

    folder: Path
    pictures: list[str]
    captions: dict[str, str]
    masks: dict[str, str]
    metadata: dict[str, str]
    ignored: list[str]
    texts: dict[str, str] = field(default_factory=dict)


def list_folder(folder: Path, caption_column: str = "") -> FolderListing:
    """Sort the files directly in `folder` into pictures, in natural order, and what goes with them.

    Hidden files are passed over. `ignored` names sub-folders, files of unknown kinds, and masks
    without a picture.

    Args:
        caption_column: see `metadata.read_captions`.

    Raises:
        DataError: the folder or its metadata file cannot be read, a name is not UTF-8, or two
            pictures share a stem.
    """
    pictures: dict[str, str] = {}
    others: dict[str, dict[str, str]] = {".txt": {}, ".json": {}, _MASK_SUFFIX: {}}
    ignored: list[str] = []
    tables: list[str] = []
    for name, is_file in _entries(folder):
        stem, suffix = os.path.splitext(name)
        suffix = suffix.lower()
        if not is_file:
            ignored.append(name)
        elif name in metadata.NAMES:
            tables.append(name)
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
    captions, details, masks = others[".txt"], others[".json"], others[_MASK_SUFFIX]
    ignored += [name for stem, name in masks.items() if stem not in pictures]
    ignored.sort(key=_natural)
    texts = _table_captions(folder, tables, set(names), caption_column)
    return FolderListing(folder, names, captions, masks, details, ignored, texts)


def _table_captions(
    folder: Path, tables: list[str], pictures: set[str], column: str
) -> dict[str, str]:
    """Captions of the metadata file, where there is one."""
    if not tables or not pictures:
        return {}
    if len(tables) > 1:
        raise DataError(f"{folder}: both {' and '.join(sorted(tables))} are there; remove one")
    return metadata.read_captions(folder / tables[0], pictures, column)


def decode_caption(data: bytes, where: str) -> str:
    """Text of a caption file without surrounding white space.

    Raises:
        DataError: not UTF-8.
    """
    return decode_text(data, where).strip()


class FolderSource:
    """The pictures directly in a folder, with their captions and .mask.png masks.

    A caption is the same-stem .txt, else that of the metadata file. Every picture is read once at
    opening: its digest is taken, its header checked, and in folders of up to `DECODED_AT_OPENING`
    pictures it is decoded, so that a broken one is found now.

    Raises:
        DataError: no picture, or more that cannot be read than `allowance` lets pass.
    """

    def __init__(self, listing: FolderListing, options: SourceOptions) -> None:
        self.where = str(listing.folder)
        self.ignored = listing.ignored
        self._listing = listing
        if not listing.pictures:
            suffixes = " ".join(sorted(images.SUFFIXES))
            other = f" (other files: {', '.join(listing.ignored[:3])})" if listing.ignored else ""
            raise DataError(f"{self.where}: no pictures; put {suffixes} files there{other}")
        with ThreadPoolExecutor(_THREADS) as pool:
            looked = list(pool.map(self._look_at, listing.pictures))
        found = [(name, *seen) for name, seen in looked if not isinstance(seen, str)]
        self.damaged = [seen for _, seen in looked if isinstance(seen, str)]
        total = len(listing.pictures)
        refuse_too_many(self.where, self.damaged, allowance(total, options.max_damaged), total)
        self._names = [name for name, _, _ in found]
        self.records = [record for _, record, _ in found]
        self.sizes = [len(self.records)]
        self._mask_digests = [mask for _, _, mask in found]
        self.digest = files.digest_of([[r.key, r.digest, r.caption, mask] for _, r, mask in found])

    def shapes(self) -> np.ndarray:
        """Height and width in pixels of every sample after orientation: int32 [N, 2]."""
        return np.array([(r.height, r.width) for r in self.records], dtype=np.int32)

    def read(self, index: int) -> bytes:
        """Picture file of a sample; DataError if it changed since opening."""
        path = self._listing.folder / self._names[index]
        return self._unchanged(path, self.records[index].digest)

    def read_mask(self, index: int) -> bytes | None:
        """Mask file of a sample, None if it has none; DataError if it changed since opening."""
        digest = self._mask_digests[index]
        if digest is None:
            return None
        name = self._listing.masks[self.records[index].key]
        return self._unchanged(self._listing.folder / name, digest)

    def _look_at(self, name: str) -> tuple[str, tuple[SampleRecord, str | None] | str]:
        """Name and what is there: record and digest of its mask, or what is wrong with it."""
        try:
            return name, self._examined(name)
        except DataError as error:
            return name, str(error)

    def _examined(self, name: str) -> tuple[SampleRecord, str | None]:
        listing, stem = self._listing, os.path.splitext(name)[0]
        path = listing.folder / name
        data = read_bounded(path, images.MAX_BYTES)
        thorough = len(listing.pictures) <= DECODED_AT_OPENING
        width, height = check_picture(data, str(path), thorough)
        text = listing.texts.get(name)
        if stem in listing.captions:
            caption_path = listing.folder / listing.captions[stem]
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


def _entries(folder: Path) -> list[tuple[str, bool]]:
    """Names directly in `folder` that are not hidden, sorted, and whether each is a file."""
    try:
        with os.scandir(folder) as entries:
            shown = [entry for entry in entries if not entry.name.startswith(".")]
            found = [(entry.name, _is_file(entry)) for entry in shown]
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror or error}") from error
    for name, _ in found:
        if not fits_a_line(name):
            what = "has control characters or is not UTF-8"
            raise DataError(f"{folder}: the file name {name!a} {what}; rename it")
    return sorted(found)


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether it is no folder; a link that leads nowhere is none: opening it will say so."""
    try:
        return entry.is_file() or (entry.is_symlink() and not entry.is_dir())
    except OSError:  # a link to itself
        return True


def _natural(name: str) -> tuple[list[str | int], str]:
    """Sort key that puts "fox-2" before "fox-10"; the name itself breaks ties."""
    parts = re.split(r"([0-9]+)", name.lower())
    return [int(part) if number % 2 else part for number, part in enumerate(parts)], name
