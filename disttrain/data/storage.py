"""Where files may lie, and reading them front to back: local paths, and URLs through fsspec.

Under `tar_samples.py` and `shard_cache.py`. Invariants: only the schemes in `SCHEMES` are ever
opened, never a command and never a chain; every wait for a store is bounded; what a store's own
code raises arrives as DataError, or as StoreTrouble where trying again may help.
"""

from __future__ import annotations

import asyncio
import io
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote, unquote, urlsplit

from disttrain.data.plain_files import fits_a_line, open_plain
from disttrain.data.workers import Stopped
from disttrain.errors import DataError

SCHEMES = ("file", "http", "https", "s3", "gs")
PAUSES = (0.5, 2.0, 8.0)
"""Seconds before each further attempt at what failed."""
PATIENCE = 60.0
"""Seconds that a store has for an answer, and for the next bytes."""
SLOWEST = 2**16
"""Bytes that must arrive within `PATIENCE`."""
_PIECE = 2**22
_BUFFER = 2**20
_GLOB_LETTERS = {"http": "*[", "s3": "*?[", "gs": "*?["}
_STORE_ERRORS = (
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
)
_Result = TypeVar("_Result")


class StoreTrouble(Exception):
    """A store did not answer or broke off: another attempt may succeed."""


def place_of(where: str | Path) -> Path | str:
    """A local path, also of a `file:` URL, as a Path; a URL of another scheme as a str.

    Raises:
        DataError: a URL of a scheme that is not read, or a chain of them.
    """
    if isinstance(where, Path):
        return where
    scheme, colon, rest = where.partition(":")
    scheme = scheme.lower()
    if not colon or not ("://" in where or scheme in ("file", "pipe")):
        return Path(where)
    host = r"//\[[0-9a-fA-F:.]*\]"  # of IPv6, whose colons are no chain
    if scheme not in SCHEMES or "::" in re.sub(host, "", rest) or not where.isprintable():
        schemes = ", ".join(SCHEMES)
        raise DataError(f"{where!r}: not read; give a path, or a URL that begins with {schemes}")
    if scheme == "file":
        return Path(_local_part(where, rest))
    try:
        parts = urlsplit(where)
    except ValueError as error:
        raise DataError(f"{where}: not a URL ({error})") from error
    if not parts.netloc or not parts.path.strip("/"):
        raise DataError(f"{where}: not the URL of a file")
    return f"{scheme}:{rest}"


def beside(index: Path | str, name: str) -> Path | str:
    """The place that `name`, written in an index lying at `index`, stands for.

    Raises:
        DataError: a place that is not read, or a local one named by an index that is not local.
    """
    place = place_of(name)
    if isinstance(place, str):
        return place
    if isinstance(index, Path):
        return index.parent / place
    if place.is_absolute() or name.lower().startswith("file:"):
        raise DataError(f"{index}: names the local file {name!r}, which is not read from there")
    if ".." in name.split("/"):
        raise DataError(f"{index}: names {name!r}, which leads out of the folder of the index")
    if _family(index) == "http":
        parts = urlsplit(index)
        index, name = f"{parts.scheme}://{parts.netloc}{parts.path}", quote(name)
    return f"{index.rpartition('/')[0]}/{name}"


def expand(url: str) -> list[str]:
    """The URLs that a pattern with `*` matches, sorted; a URL without one stands for itself.

    Raises:
        DataError: the store cannot list, or did not answer.
    """
    family, rest = _family(url), url.partition("://")[2]
    if not any(letter in rest.partition("/")[2] for letter in _GLOB_LETTERS[family]):
        return [url]
    if family == "http":
        raise DataError(f"{url}: web servers do not list files; use braces, as in {{000..099}}.tar")

    def listed() -> list[str]:
        with _explained(url):
            found = _filesystem(family, os.getpid()).glob(rest, timeout=5 * PATIENCE)
        return sorted(f"{family}://{path}" for path in found)

    return attempts(url, listed)


def version(url: str) -> str | None:
    """What the store says identifies the present content of a file; None where it says nothing."""
    with _explained(url):
        store = _filesystem(_family(url), os.getpid())
        try:
            info: dict[str, Any] = store.info(url, timeout=PATIENCE)
        except FileNotFoundError:
            if _family(url) == "http":  # raised for every failure; reading will say which
                return None
            raise
    if _family(url) == "http":
        found = {name: info[name] for name in ("ETag", "Content-MD5") if name in info}
        return str({**found, "size": info.get("size")}) if found else None
    return str(sorted((name, str(value)) for name, value in info.items()))


@contextmanager
def reading(place: Path | str) -> Iterator[BinaryIO]:
    """The bytes at a place, front to back.

    Raises:
        OSError: a local file is missing or no plain file.
        DataError, StoreTrouble: opening or reading a URL failed; see `attempts`.
    """
    if isinstance(place, Path):
        with os.fdopen(open_plain(place), "rb") as handle:
            yield handle
    else:
        with io.BufferedReader(_Stream(place), _BUFFER) as handle:  # pyright: ignore
            yield handle


def attempts(
    place: Path | str, work: Callable[[], _Result], stop: threading.Event | None = None
) -> _Result:
    """The result of `work`, begun anew after a pause when it ends in StoreTrouble.

    Raises:
        DataError: every attempt failed.
        Stopped: `stop` was set meanwhile.
    """
    stop = stop or threading.Event()
    for pause in PAUSES:
        try:
            return work()
        except StoreTrouble:
            if stop.wait(pause):
                raise Stopped from None
    try:
        return work()
    except StoreTrouble as error:
        raise DataError(
            f"{place}: {error} ({len(PAUSES) + 1} attempts); try again later"
        ) from error


class _Stream(io.RawIOBase):
    """A file of a store, front to back."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._window, self._arrived = time.monotonic(), 0
        with _explained(url):
            store = _filesystem(_family(url), os.getpid())
            kind = _WholeResponse if _family(url) == "http" else _Ranges
            self._body = kind(store, url)

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill what has arrived into `buffer`; 0 at the end."""
        with _explained(self._url):
            data = self._body.read(len(buffer))
        buffer[: len(data)] = data
        self._arrived += len(data)
        if time.monotonic() - self._window > PATIENCE:
            if self._arrived < SLOWEST and data:
                raise StoreTrouble(f"only {self._arrived} bytes in {PATIENCE:.0f} seconds")
            self._window, self._arrived = time.monotonic(), 0
        return len(data)

    def close(self) -> None:
        """Let go of the connection."""
        if not self.closed and hasattr(self, "_body"):
            with _explained(self._url):
                self._body.close()
        super().close()


class _WholeResponse:
    """The body of one answer, which needs no server that knows ranges."""

    def __init__(self, store: Any, url: str) -> None:
        headers = {"Accept-Encoding": "identity"}
        self._store = store
        self._file = self._wait(store.open_async, url, "rb", size=0, headers=headers)

    def read(self, size: int) -> bytes:
        """Up to `size` bytes."""
        return self._wait(self._file.read, size)

    def close(self) -> None:
        """Drop the connection."""
        self._wait(self._file.close)

    def _wait(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        from fsspec.asyn import sync

        return sync(self._store.loop, call, *arguments, timeout=PATIENCE, **named)


class _Ranges:
    """The body in pieces, each asked for by itself and with its own time limit."""

    def __init__(self, store: Any, url: str) -> None:
        self._store, self._url = store, url
        self._info = store.info(url, timeout=PATIENCE)
        if self._info.get("type") != "file":
            raise FileNotFoundError(url)
        self._position, self._piece, self._used = 0, b"", 0

    def read(self, size: int) -> bytes:
        """Up to `size` bytes."""
        if self._used == len(self._piece):
            self._piece, self._used = self._next_piece(), 0
        data = self._piece[self._used : self._used + size]
        self._used += len(data)
        return data

    def _next_piece(self) -> bytes:
        start, end = self._position, min(self._position + _PIECE, self._info["size"])
        if start == end:
            if self._store.info(self._url, timeout=PATIENCE) != self._info:
                raise StoreTrouble("changed while it was read")
            return b""
        piece = self._store.cat_file(self._url, start=start, end=end, timeout=2 * PATIENCE)
        if len(piece) != end - start:
            raise StoreTrouble(f"broke off at byte {start + len(piece)}")
        self._position = end
        return piece

    def close(self) -> None:
        """Nothing stays open between pieces."""


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn what a store's code raises into DataError, or StoreTrouble if it may pass."""
    try:
        yield
    except (DataError, StoreTrouble):
        raise
    except FileNotFoundError as error:
        raise DataError(f"{url}: no such file") from error
    except PermissionError as error:
        raise DataError(f"{url}: no permission to read it; check your credentials") from error
    except ValueError as error:
        raise DataError(f"{url}: {_line(error)}") from error
    except _store_errors() as error:
        status = getattr(error, "status", None) or getattr(error, "code", None)
        if isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429):
            raise DataError(f"{url}: refused (status {status})") from error
        if "Credentials" in type(error).__name__:
            raise DataError(f"{url}: {_line(error)}; set them up for this store") from error
        raise StoreTrouble(_line(error)) from error


def _store_errors() -> tuple[type[Exception], ...]:
    """What the stores' packages raise; those that are not loaded raise nothing."""
    own = [
        getattr(sys.modules[module], name)
        for module, name in _STORE_ERRORS
        if module in sys.modules
    ]
    return (OSError, asyncio.TimeoutError, EOFError, RuntimeError, *own)


def _line(error: Exception) -> str:
    """What an exception says, on one short line; time-outs say nothing."""
    text = " ".join(str(error).split())[:200]
    return text or f"no answer within {PATIENCE:.0f} seconds ({type(error).__name__})"


def _family(url: str) -> str:
    scheme = url.partition(":")[0]
    return "http" if scheme == "https" else scheme


def _local_part(url: str, rest: str) -> str:
    """Path of a `file:` URL; `rest` is what follows the colon."""
    path = unquote(rest)
    if rest.startswith("//"):
        host, _, path = rest[2:].partition("/")
        if host not in ("", "localhost"):
            raise DataError(f"{url}: a file URL of another machine; write file:///path")
        path = "/" + unquote(path)
    if not fits_a_line(path):
        raise DataError(f"{url[:200]}: not the URL of a file")
    return path


@cache
def _filesystem(family: str, process: int) -> Any:
    """The fsspec file system of a family; `process` because none of them survives a fork."""
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    try:
        if family == "http":
            import aiohttp

            limits = aiohttp.ClientTimeout(total=None, sock_connect=PATIENCE, sock_read=PATIENCE)
            options["client_kwargs"] = {
                "timeout": limits,  # aiohttp's own ends every answer after five minutes
                "trust_env": True,
                "read_bufsize": _BUFFER,
            }
        return fsspec.filesystem(family, **options)
    except ImportError as error:
        raise DataError(
            f"reading {family}: URLs needs another package ({error.name}); "
            f"pip install 'disttrain[{family}]'"
        ) from error
