"""Reading files that a person put there: within bounds, and only what is a plain file.

Under everything that reads pictures, captions and shards. Invariant: a named pipe or device is
refused before anything is read from it, so nothing here waits for ever.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from disttrain.errors import DataError

LONGEST_NAME = 1024
_NOT_SHOWN = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def fits_a_line(name: str) -> bool:
    """Whether a name can stand in a message as it is: no controls, not endless, and UTF-8."""
    return len(name) <= LONGEST_NAME and not _NOT_SHOWN.search(name)


def open_plain(path: Path) -> int:
    """Descriptor of a plain file, to be closed by the caller.

    Raises:
        OSError: missing, unreadable, or not a plain file.
    """
    # Without O_NONBLOCK, opening a named pipe that somebody put there would wait for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a plain file")
    return descriptor


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


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Say of a place where the block writes what went wrong there: no space, no permission.

    Raises:
        DataError: for any OSError.
    """
    try:
        yield
    except OSError as error:
        raise DataError(f"{place}: cannot be written ({error.strerror or error})") from error


def decode_text(data: bytes, where: str) -> str:
    """UTF-8 text, without the mark that some editors begin with.

    Raises:
        DataError: not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error
