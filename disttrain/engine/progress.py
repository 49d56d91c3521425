"""What rank zero shows while a run goes: a live bar on a terminal, plain lines elsewhere.

Invariant: other ranks print nothing but warnings, with their host and rank; a plain line is
complete in itself, so logs can be searched.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import TextIOBase
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Rank zero's voice.

    Args:
        shown: False on every other rank.
        details: False leaves out hints and counters, which a fleet would have by the hundred.
    """

    def __init__(self, shown: bool, details: bool = True) -> None:
        self.shown, self.details = shown, details
        self.live = shown and sys.stdout.isatty()
        self.console = Console(highlight=False, soft_wrap=True)
        self.bar: RichProgress | None = None
        self.last_line = float("-inf")
        self.log: TextIOBase | None = None
        """Gets a copy of every plain line."""
        self.terminal: TextIO | None = None
        """Where warnings of other ranks are shown, if not on standard error."""

    def say(self, text: str) -> None:
        """One line."""
        self.keep(text)
        if not self.shown:
            return
        if self.live:
            self.console.print(text, markup=False)
        else:
            print(text, flush=True)

    def keep(self, text: str) -> None:
        """One line for the log alone."""
        if self.log is not None:
            self.log.write(f"{text}\n")

    def warn(self, text: str) -> None:
        """One line that a person should not miss."""
        self.say(f"warning: {text}")

    def hint(self, text: str) -> None:
        """A warning that can be left out."""
        if self.details:
            self.warn(text)

    def warn_from(self, rank: int, text: str) -> None:
        """A line that a person should not miss, from whichever rank has it to say."""
        if self.shown:
            self.warn(text)
            return
        line = f"[{socket.gethostname()} rank {rank}] warning: {text}"
        self.keep(line)
        print(line, file=self.terminal or sys.stderr, flush=True)

    @contextmanager
    def counter(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """A function of (done, total) that shows how far it is, from its first call on."""
        begun = False

        def count(done: int, total: int) -> None:
            nonlocal begun
            if not self.details:
                return
            if not begun:
                self.start(what, total, 0)
                begun = True
            self.advance(done, total, what, "")

        try:
            yield count
        finally:
            self.stop()

    def start(self, what: str, total: int, done: int) -> None:
        """Begin a bar."""
        self.last_line = time.monotonic() if total else float("-inf")
        if self.live:
            self.bar = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[detail]}", markup=False),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.bar.add_task(what, total=total, completed=done, detail="")
            self.bar.start()

    def advance(self, done: int, total: int, what: str, detail: str, left: str = "") -> None:
        """Show how far it is; plain lines come every ten seconds and at the end."""
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=done, detail=detail)
        now = time.monotonic()
        if now - self.last_line >= SECONDS_BETWEEN_LINES or done == total:
            self.last_line = now
            parts = [f"{what} {done}/{total}", detail, left]
            line = "  ".join(part for part in parts if part)
            self.keep(line)
            if self.shown and self.bar is None:
                print(line, flush=True)

    def stop(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def plain_duration(seconds: float) -> str:
    """Seconds as 45s, 12m30s or 3h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def join_names(names: Iterable[str]) -> str:
    """Names for one line, at most five of them."""
    listed = list(names)
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    return ", ".join(listed[:5]) + more
