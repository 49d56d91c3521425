"""Who trains which subject: leases in the shared run folder.

Between the workers of a fleet, which talk in no other way. Invariant: all taking happens under one
lock, so at any moment a subject belongs to at most one worker; a lease that nobody renews runs out,
so a dead worker keeps no subject.

`claims/NAME.json` says who; the time of its last change is the last sign of life.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from disttrain.engine.distributed import WorkerPlace
from disttrain.errors import DataError
from disttrain.files import exclusively, read_json, write_json

BEATS_PER_LEASE = 4


class Claims:
    """The subjects of this worker, kept alive in the background.

    Args:
        folder: `claims/` of the run folder.
        seconds: after which a lease without a sign of life is another's to take.
        place: which worker this is.
        static: take only every count-th subject, look at nobody's leases and lock nothing.
    """

    def __init__(self, folder: Path, seconds: float, place: WorkerPlace, static: bool) -> None:
        self.folder, self.seconds, self.place, self.static = folder, seconds, place, static
        self.process, self.space = os.getpid(), _process_space()
        self.worker = f"{place.number}@{socket.gethostname()}:{self.process}"
        self._token = uuid.uuid4().hex
        self._own: set[str] = set()
        self._stop = threading.Event()
        self._beat = threading.Thread(target=self._keep_alive, daemon=True)

    def __enter__(self) -> Claims:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._beat.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._stop.set()
        self._beat.join()
        self.release(list(self._own))

    def take(
        self, names: Iterable[str], count: int, wanted: Callable[[str, list[str]], bool]
    ) -> list[str]:
        """Claim up to `count` subjects that nobody has.

        Args:
            names: of all subjects, in the order of the manifest.
            wanted: whether a subject is to be trained at all and goes with those taken already;
                asked under the lock, so what it sees on disk is settled.
        """
        found: list[str] = []
        with self._alone() as now:
            for number, name in enumerate(names):
                if len(found) == count:
                    break
                mine = not self.static or number % self.place.count == self.place.number
                free = self.static or self._free(name, now)
                if mine and name not in self._own and free and wanted(name, found):
                    write_json(self._path(name), self._mark())
                    self._own.add(name)
                    found.append(name)
        return found

    def holds(self, name: str) -> bool:
        """Whether a subject is still this worker's: one that slept too long may have lost it.

        If it is, the lease begins anew, so that nobody else takes it before what follows is done.
        """
        with self._alone():
            return self._renewed(name)

    def release(self, names: Iterable[str]) -> None:
        """Give subjects back."""
        with self._alone():
            for name in names:
                if self._renewed(name):
                    self._path(name).unlink(missing_ok=True)
                self._own.discard(name)

    def owners(self) -> dict[str, str]:
        """Who has which subject now, by what the leases say; for people."""
        now = self._time()
        paths = sorted(self.folder.glob("*.json"))
        return {
            path.stem: str(self._owner(path.stem).get("worker", ""))
            for path in paths
            if not self._free(path.stem, now)
        }

    @contextmanager
    def _alone(self) -> Iterator[float]:
        """Nobody else takes inside; gives the file system's own time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.static:
            yield 0.0
            return
        with exclusively(self.folder / ".lock"):
            yield self._time()

    def _time(self) -> float:
        """The file system's own time; this machine's where nothing may be written."""
        lock = self.folder / ".lock"
        try:
            os.utime(lock)
            return lock.stat().st_mtime
        except OSError:
            return time.time()

    def _free(self, name: str, now: float) -> bool:
        path = self._path(name)
        try:
            age = now - path.stat().st_mtime
        except FileNotFoundError:
            return True
        owner = self._owner(name)
        if owner.get("space") == self.space and _dead(owner.get("process"), owner.get("started")):
            return True
        lease = owner.get("seconds")
        if not (isinstance(lease, (int, float)) and 0 < lease < float("inf")):
            lease = self.seconds
        return age > lease

    def _owner(self, name: str) -> dict:
        try:
            found = read_json(self._path(name))
        except DataError:
            return {}
        return found if isinstance(found, dict) else {}

    def _renewed(self, name: str) -> bool:
        mine = name in self._own and self._owner(name).get("token") == self._token
        if mine:
            os.utime(self._path(name))
        return mine

    def _mark(self) -> dict[str, object]:
        return {
            "worker": self.worker,
            "space": self.space,
            "process": self.process,
            "started": _of_process(self.process)[2],
            "seconds": self.seconds,
            "token": self._token,
        }

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _keep_alive(self) -> None:
        # Without the lock, for which others may make this wait longer than a lease lasts. Whoever
        # took a subject that was lost meanwhile gets a sign of life for nothing, which is harmless.
        while not self._stop.wait(self.seconds / BEATS_PER_LEASE):
            for name in list(self._own):
                try:
                    self._renewed(name)
                except OSError:  # a file system that is away for a moment; the next beat tries
                    continue


def _process_space() -> str:
    """Names where process numbers mean the same processes: a boot of a machine, a container."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    if not (boot.is_file() and namespace.is_symlink()):
        return uuid.uuid4().hex
    # Copies of one virtual machine may have the same boot, but not the same name.
    return f"{socket.gethostname()} {boot.read_text().strip()} {os.readlink(namespace)}"


def _dead(process: object, started: object) -> bool:
    """Whether a process of this space is certain to have ended."""
    if not isinstance(process, int) or process <= 0:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    state, threads, start = _of_process(process)
    # Ended, though its parent has not asked for its exit code: its first thread seems so before the
    # others have let go of their files.
    ended = state in ("Z", "X") and threads <= 1
    return ended or (bool(start) and isinstance(started, str) and start != started)


def _of_process(process: int) -> tuple[str, int, str]:
    """State, threads and start of a process; by its start it differs from a later one of the same
    number."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", 0, ""
    words = text.rpartition(")")[2].split()
    return words[0], int(words[17]), words[19]
