"""Who trains which subject: leases in the shared run folder.

Between the workers of a fleet, which talk in no other way. Invariant: all looking and taking
happens under one lock, so at any moment a subject belongs to at most one worker; a lease that
nobody renews runs out, so a dead worker keeps no subject.

`claims/NAME.json` says who; the time of its last change is the last sign of life.
"""

from __future__ import annotations

import os
import socket
import threading
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
        static: take only every count-th subject, and look at nobody's leases.
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
                if mine and name not in self._own and self._free(name, now) and wanted(name, found):
                    write_json(self._path(name), self._mark())
                    self._own.add(name)
                    found.append(name)
        return found

    def holds(self, name: str) -> bool:
        """Whether a subject is still this worker's: one that slept too long may have lost it."""
        return name in self._own and self._owner(name).get("token") == self._token

    def release(self, names: Iterable[str]) -> None:
        """Give subjects back."""
        with self._alone():
            for name in names:
                if self.holds(name):
                    self._path(name).unlink(missing_ok=True)
                self._own.discard(name)

    def owners(self) -> dict[str, str]:
        """Who has which subject now, by what the leases say; for people."""
        with self._alone() as now:
            paths = sorted(self.folder.glob("*.json"))
            return {
                path.stem: self._owner(path.stem).get("worker", "")
                for path in paths
                if not self._free(path.stem, now)
            }

    @contextmanager
    def _alone(self) -> Iterator[float]:
        """Nobody else looks or takes inside; gives the file system's own time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = self.folder / ".lock"
        with exclusively(lock):
            os.utime(lock)
            yield lock.stat().st_mtime

    def _free(self, name: str, now: float) -> bool:
        path = self._path(name)
        try:
            age = now - path.stat().st_mtime
        except FileNotFoundError:
            return True
        owner = self._owner(name)
        if owner.get("space") == self.space and not _alive(owner.get("process", 0)):
            return True
        return age > owner.get("seconds", self.seconds)

    def _owner(self, name: str) -> dict:
        try:
            found = read_json(self._path(name))
        except DataError:
            return {}
        return found if isinstance(found, dict) else {}

    def _mark(self) -> dict[str, object]:
        return {
            "worker": self.worker,
            "space": self.space,
            "process": self.process,
            "seconds": self.seconds,
            "token": self._token,
        }

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _keep_alive(self) -> None:
        while not self._stop.wait(self.seconds / BEATS_PER_LEASE):
            try:
                with self._alone():
                    for name in list(self._own):
                        if self.holds(name):
                            os.utime(self._path(name))
            except OSError:  # a file system that is away for a moment; the next beat tries again
                continue


def _process_space() -> str:
    """Names where process numbers mean the same processes: a boot of a machine, a container."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    known = boot.is_file() and namespace.is_symlink()
    return f"{boot.read_text().strip()} {os.readlink(namespace)}" if known else uuid.uuid4().hex


def _alive(process: int) -> bool:
    """Whether a process of this machine exists."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError, TypeError):
        return True
    return process > 0
