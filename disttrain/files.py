"""Writing files so that a crash leaves the old one or the new one, and reading them within bounds.

The only module that renames and hashes. Invariant: a path written through here is either absent,
the complete previous content, or the complete new content; temporary names start with a dot and
end in `.tmp`, and nothing reads them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from disttrain.errors import DataError, UserError

if TYPE_CHECKING:
    import torch

TEXT_LIMIT = 64 * 2**20


class Readable(Protocol):
    """Anything that gives bytes front to back."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; empty at the end."""
        ...


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_writer(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that becomes `path` when the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder that becomes `path` when the block ends; every file in it is synced first.

    An existing folder at `path` is replaced: it is moved aside, then removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield temporary
        for found in sorted(temporary.rglob("*")):
            if found.is_file():
                with found.open("rb") as handle:
                    os.fsync(handle.fileno())
            else:
                sync_folder(found)
        temporary.chmod(0o777 & ~_umask())
        sync_folder(temporary)
        if path.exists():
            aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
            os.replace(path, aside / "old")
            os.replace(temporary, path)
            shutil.rmtree(aside)
        else:
            os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` atomically."""
    with atomic_writer(path) as handle:
        handle.write(data)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8) atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Replace `path` by a safetensors file atomically; tensors may lie on any device."""
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(plain, metadata=metadata))


def remove_folder(path: Path) -> None:
    """Remove a folder so that a crash half-way leaves no folder of that name."""
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    os.replace(path, aside / "old")
    shutil.rmtree(aside)


def remove_temporaries(folder: Path) -> None:
    """Clear what killed writers left in `folder` and below; call only under the folder's lock."""
    for left in list(folder.rglob(".*.tmp")):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def read_text(path: Path, limit: int = TEXT_LIMIT) -> str:
    """UTF-8 text of a file of at most `limit` bytes, without the mark that some editors begin with.

    Raises:
        DataError: missing, unreadable, too large or not UTF-8.
    """
    try:
        size = path.stat().st_size
        if size > limit:
            raise DataError(f"{path}: {size} bytes of text, the limit is {limit}")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def read_json(path: Path, limit: int = TEXT_LIMIT) -> Any:
    """Parsed JSON of a bounded file.

    Raises:
        DataError: unreadable or not JSON.
    """
    text = read_text(path, limit)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON (line {error.lineno}: {error.msg})") from error
    except RecursionError as error:
        raise DataError(f"{path}: JSON nested too deeply") from error
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{path}: not JSON ({error})") from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file on the CPU.

    Raises:
        DataError: missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: not a readable safetensors file ({error})") from error


def sha256_bytes(data: bytes) -> str:
    """Hex sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's content, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(2**20):
            digest.update(block)
    return digest.hexdigest()


class HashingReader:
    """A file or stream read front to back: `digest` and `size` are of what was read so far."""

    def __init__(self, handle: Readable) -> None:
        self._handle, self._digest, self.size = handle, hashlib.sha256(), 0

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; empty at the end."""
        data = self._handle.read(size)
        self._digest.update(data)
        self.size += len(data)
        return data

    @property
    def digest(self) -> str:
        """Hex sha256 so far."""
        return self._digest.hexdigest()


class HashingWriter:
    """Passes bytes on to `write`: `digest` and `size` are of what was written so far."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write, self._digest, self.size = write, hashlib.sha256(), 0

    def write(self, data: bytes) -> None:
        """Write all of `data`."""
        self._write(data)
        self._digest.update(data)
        self.size += len(data)

    @property
    def digest(self) -> str:
        """Hex sha256 so far."""
        return self._digest.hexdigest()


@contextmanager
def content_writer(folder: Path, suffix: str) -> Iterator[HashingWriter]:
    """A file that is named by its own sha256 and `suffix` when the block ends without an exception.

    `path_of_content` gives the name that it then has. While it is written it is locked, so that
    `remove_unused` tells it from what a killed writer left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=folder, prefix=".content.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            writer = HashingWriter(handle.write)
            yield writer
            handle.flush()
            os.fsync(handle.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path_of_content(folder, writer.digest, suffix))
        sync_folder(folder)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def path_of_content(folder: Path, digest: str, suffix: str) -> Path:
    """Where a file lies that is named by its content."""
    return folder / f"{digest}{suffix}"


@contextmanager
def exclusively(lock: Path, seconds: float | None = None) -> Iterator[None]:
    """Wait until no other process or thread is in a block of the same lock file.

    Uses flock, so a killed owner keeps nobody waiting.

    Args:
        seconds: the longest to wait; None waits for ever.

    Raises:
        TimeoutError: others were in the block all that time.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    deadline = None if seconds is None else time.monotonic() + seconds
    with lock.open("a") as handle:
        while not _locked(handle, wait=deadline is None):
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"another process has held {lock} for {seconds:.0f} s")
            time.sleep(0.1)
        yield


def _locked(handle: IO[str], wait: bool) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def keep_in_use(descriptor: int) -> None:
    """Keep `remove_unused` off an open file until the descriptor is closed."""
    fcntl.flock(descriptor, fcntl.LOCK_SH)


def remove_unused(path: Path) -> bool:
    """Remove a file unless somebody writes it or keeps it in use; whether it is gone."""
    try:
        with path.open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def digest_of(value: Any) -> str:
    """Hex sha256 of a JSON-able value, whatever the order of its keys."""
    return sha256_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


class FolderLock:
    """Exclusive use of a folder by one process, released by the system when that process dies.

    Uses flock on `FOLDER/.lock`, so a killed owner leaves nothing stale behind.

    Raises:
        UserError: another live process holds it; the message names its host and process id.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.handle = (folder / ".lock").open("a+")
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.handle.seek(0)
            owner = self.handle.read(200).strip() or "another process"
            self.handle.close()
            raise UserError(
                f"{folder} is in use by {owner}; wait for it, stop it, or use --fresh"
            ) from error
        self.handle.truncate(0)
        self.handle.write(f"process {os.getpid()} on {socket.gethostname()}")
        self.handle.flush()

    def release(self) -> None:
        """Let the next process in; calling it twice is harmless."""
        self.handle.close()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
