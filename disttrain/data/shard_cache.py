"""Copies of indexes and shards that lie behind URLs, kept in a folder within a limit of bytes.

Between `storage.py` and `shard_source.py`. A shard is fetched whole when it is first touched.
Invariants: a copy has its name, which is its sha256, only when every byte has arrived and the
digest is the wanted one; any number of processes and machines may share the folder: one fetches
while the others wait, and one that is killed keeps nobody waiting; copies that somebody reads are
not removed.
"""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

from disttrain import files
from disttrain.data import storage
from disttrain.data.index import ShardEntry
from disttrain.data.plain_files import open_plain
from disttrain.errors import DataError

INDEX_LIMIT = 2**33
"""Bytes of the largest index that is fetched."""
_PIECE = 2**20
_TRIES = 5  # to open what another process may remove between its arrival and its opening
_ABANDONED = 60.0  # seconds after which an unlocked temporary file was left by a killed process


class _WrongContent(Exception):
    """What arrived is not what the index describes."""


@dataclass(frozen=True)
class ShardCache:
    """A folder of fetched indexes and shards.

    Args:
        limit: bytes that shards may take. More are there only while they are in use.
    """

    folder: Path
    limit: int

    def index(self, url: str) -> Path:
        """A local copy of the present index at a URL.

        A copy is used again as long as the store says that the content is the same; where it does
        not say, the index is fetched each time.

        Raises:
            DataError: missing, too large, or the store does not answer.
        """
        indexes = self.folder / "indexes"
        with self._one_at_a_time(url):
            found = storage.attempts(url, lambda: storage.version(url))
            note = indexes / f"{files.digest_of([url, found])}.txt"
            if found is not None and note.is_file():
                path = files.path_of_content(indexes, files.read_text(note, 1000), ".json")
                if path.is_file():
                    return path
            path = storage.attempts(url, lambda: self._fetch_index(url, indexes))
            if found is not None and storage.attempts(url, lambda: storage.version(url)) == found:
                files.write_text(note, path.stem)
            return path

    def open(self, entry: ShardEntry, url: str) -> int:
        """Descriptor of a whole copy of a shard, which stays while it is open.

        Raises:
            DataError: missing, not what the index describes, or the store does not answer.
            OSError: the folder cannot be written.
        """
        path = files.path_of_content(self.folder / "shards", entry.sha256, ".tar")
        for _ in range(_TRIES):
            descriptor = _opened(path)
            if descriptor is None:
                with self._one_at_a_time(entry.sha256):
                    descriptor = _opened(path)
                    if descriptor is None:
                        self._make_room(entry.bytes)
                        self._fetch_shard(entry, url)
                        descriptor = _opened(path)
            if descriptor is not None:
                with suppress(PermissionError):  # a copy that another user fetched
                    os.utime(descriptor)
                return descriptor
        raise DataError(f"{url}: its copy in {self.folder} is removed again and again; check why")

    def discard(self, entry: ShardEntry) -> None:
        """Forget a copy that turned out damaged; the next `open` fetches the shard anew."""
        path = files.path_of_content(self.folder / "shards", entry.sha256, ".tar")
        path.unlink(missing_ok=True)

    def _one_at_a_time(self, name: str) -> AbstractContextManager[None]:
        slot = files.digest_of(name)[:2]  # 256 lock files however many shards there are
        return files.exclusively(self.folder / "locks" / slot)

    def _fetch_index(self, url: str, indexes: Path) -> Path:
        with storage.reading(url) as handle, files.content_writer(indexes, ".json") as writer:
            while piece := handle.read(_PIECE):
                writer.write(piece)
                if writer.size > INDEX_LIMIT:
                    raise DataError(f"{url}: an index of over {INDEX_LIMIT} bytes")
        return files.path_of_content(indexes, writer.digest, ".json")

    def _fetch_shard(self, entry: ShardEntry, url: str) -> None:
        try:
            storage.attempts(url, lambda: self._copy(entry, url))
        except _WrongContent:
            try:  # once more: it may have been replaced while it was read
                storage.attempts(url, lambda: self._copy(entry, url))
            except _WrongContent as error:
                raise DataError(
                    f"{url}: not what the index describes ({error}); "
                    "put the shard back or write the index again"
                ) from error

    def _copy(self, entry: ShardEntry, url: str) -> None:
        shards = self.folder / "shards"
        with storage.reading(url) as handle, files.content_writer(shards, ".tar") as writer:
            while piece := handle.read(_PIECE):
                writer.write(piece)
                if writer.size > entry.bytes:
                    raise _WrongContent(f"more than its {entry.bytes} bytes")
            if writer.digest != entry.sha256:
                raise _WrongContent(f"another digest, {writer.size} of {entry.bytes} bytes")

    def _make_room(self, needed: int) -> None:
        """Remove the least recently used shards until `needed` bytes fit, and abandoned files."""
        with files.exclusively(self.folder / "locks" / "room"):
            found = []
            for path in (self.folder / "shards").glob("*"):
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue
                if path.suffix == ".tar":
                    found.append((status.st_mtime_ns, status.st_size, path))
                elif path.suffix == ".tmp" and time.time() - status.st_mtime > _ABANDONED:
                    files.remove_unused(path)
            total = needed + sum(size for _, size, _ in found)
            for _, size, path in sorted(found):
                if total <= self.limit:
                    break
                if files.remove_unused(path):
                    total -= size


def _opened(path: Path) -> int | None:
    """Descriptor of a copy, if it is there."""
    try:
        descriptor = open_plain(path)
    except FileNotFoundError:
        return None
    files.keep_in_use(descriptor)
    return descriptor
