"""What each process of a run says, kept in a file of its own: RUN/logs/.

Around training, from the moment the run folder exists. Invariant: a log that cannot be written
never stops a run; the terminal shows rank zero as it would without logs, and of the other ranks
only warnings and errors.

Rank zero, and each worker of a fleet, keeps its terminal and leaves a copy of its plain lines. Of
the others everything goes into the file, also what C libraries write: their descriptors 1 and 2.
"""

from __future__ import annotations

import faulthandler
import io
import os
import re
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import TextIO

from disttrain.engine.progress import Progress
from disttrain.errors import UserError

CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
HELD_BACK = 2**16


class LogFile(io.TextIOBase):
    """A file to which lines are added; what it cannot take is dropped, said once on `terminal`."""

    def __init__(self, path: Path, terminal: TextIO) -> None:
        super().__init__()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.terminal, self._said = path, terminal, False
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o666)

    def write(self, text: str, /) -> int:
        """Add text, at once; nothing once the log is closed."""
        data = text.encode(errors="backslashreplace")
        try:
            while data and not self.closed:
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            if not self._said:
                self._said = True
                warn_without(self.path, error, self.terminal)
        return len(text)

    def fileno(self) -> int:
        """The descriptor, for what writes without Python."""
        return self._descriptor

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            os.close(self._descriptor)
        super().close()


class Copying(io.TextIOBase):
    """Standard error of a process that keeps its terminal: all to there, whole lines to the log."""

    def __init__(self, terminal: TextIO, log: LogFile) -> None:
        super().__init__()
        self._terminal, self._log, self._begun = terminal, log, ""

    def write(self, text: str, /) -> int:
        """Pass text on; of a line that was overwritten in place the log gets its last state."""
        *lines, begun = (self._begun + text).split("\n")
        for line in lines:
            plain = CONTROL.sub("", line.rstrip("\r").rpartition("\r")[2])
            if plain.strip():
                self._log.write(f"{plain}\n")
        self._begun = begun[-HELD_BACK:]
        return self._terminal.write(text)

    def flush(self) -> None:
        """Of the terminal; the log has no buffer."""
        self._terminal.flush()

    def fileno(self) -> int:
        """The terminal's."""
        return self._terminal.fileno()

    def isatty(self) -> bool:
        """Whether the terminal is one."""
        return self._terminal.isatty()


@contextmanager
def rank_log(folder: Path, rank: int, world: int, progress: Progress) -> Iterator[None]:
    """Inside the block a rank of a run writes `folder/rank-N-HOST.log`."""
    title = f"rank {rank} of {world}"
    with _log(folder / f"rank-{rank}-{_host()}.log", title, progress, keeps_terminal=rank == 0):
        yield


@contextmanager
def worker_log(folder: Path, progress: Progress) -> Iterator[None]:
    """Inside the block a worker of a fleet writes `folder/worker-HOST-PID.log`."""
    name = f"worker-{_host()}-{os.getpid()}.log"
    with _log(folder / name, "worker of a fleet", progress, keeps_terminal=True):
        yield


def warn_without(path: Path, error: OSError, terminal: TextIO) -> None:
    """Say that a log is not written."""
    reason = error.strerror or error
    print(
        f"[{socket.gethostname()}] warning: {path}: {reason}; going on without this log",
        file=terminal,
        flush=True,
    )


@contextmanager
def _log(path: Path, title: str, progress: Progress, keeps_terminal: bool) -> Iterator[None]:
    try:
        log = LogFile(path, sys.stderr)
    except OSError as error:
        warn_without(path, error, sys.stderr)
        yield
        return
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    log.write(f"=== {now}  {title} on {socket.gethostname()}, process {os.getpid()}\n")
    keeping = _copied(log, progress) if keeps_terminal else _redirected(log, progress)
    dumps = not faulthandler.is_enabled()  # else somebody chose another place for them
    if dumps:
        faulthandler.enable(log.fileno())
    try:
        with keeping:
            try:
                yield
            except BaseException as error:
                log.write(_last_words(error))
                raise
    finally:
        if dumps:
            faulthandler.disable()
        log.close()


def _last_words(error: BaseException) -> str:
    if isinstance(error, UserError):
        return f"disttrain: {error}\n"
    return "".join(traceback.format_exception(error))


@contextmanager
def _copied(log: LogFile, progress: Progress) -> Iterator[None]:
    """The terminal as it is; what is said there by Python goes to the log too."""
    before = sys.stderr
    sys.stderr, progress.log = Copying(before, log), log
    try:
        yield
    finally:
        sys.stderr, progress.log = before, None


@contextmanager
def _redirected(log: LogFile, progress: Progress) -> Iterator[None]:
    """Standard output and error are the log; `progress` still reaches the terminal to warn."""
    streams = sys.stdout, sys.stderr
    for stream in streams:
        stream.flush()
    kept = os.dup(1), os.dup(2)
    terminal = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    progress.log, progress.terminal, log.terminal = log, terminal, terminal
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    # The stream objects of before would raise where the disk is full; this one does not.
    sys.stdout = sys.stderr = log
    try:
        yield
    finally:
        for stream in streams:
            with suppress(OSError):  # what they hold, a full disk did not take
                stream.flush()
        sys.stdout, sys.stderr = streams
        for descriptor, original in zip((1, 2), kept, strict=True):
            os.dup2(original, descriptor)
            os.close(original)
        progress.log, progress.terminal, log.terminal = None, None, streams[1]
        terminal.close()


def _host() -> str:
    return re.sub(r"[^\w.-]", "_", socket.gethostname())
