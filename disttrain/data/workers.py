"""Many items worked on at once by threads, results in order, memory bounded: used by `shards.py`.

Invariant: no more than two items a worker are ahead of the consumer; leaving early stops the rest.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Progress = Callable[[int, int], None]
"""Called with (done, total); never by two threads at once."""
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Stopped(Exception):
    """Another worker failed or the user cancelled: leave without finishing the shard."""


class Counter:
    """Progress of several threads, and their common sign to stop."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.stop = threading.Event()
        self._done, self._total, self._progress = 0, total, progress
        self._lock = threading.Lock()

    def advance(self) -> None:
        """One more done."""
        with self._lock:
            self._done += 1
            if self._progress is not None:
                self._progress(self._done, self._total)


def in_order(
    work: Callable[[_Item], _Result],
    items: Iterable[_Item],
    workers: int | None,
    stop: threading.Event,
) -> Generator[_Result, None, None]:
    """Results of `work` in the order of `items`, a bounded number ahead of the consumer.

    However it is left, `stop` is set, what has not begun is dropped, and what runs is waited for.
    `work` on threads suits what Pillow, hashing and files do, all without the interpreter's lock.
    """
    workers = workers or min(8, os.cpu_count() or 1)
    pending: deque[Future[_Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            stop.set()
            for future in pending:
                future.cancel()
