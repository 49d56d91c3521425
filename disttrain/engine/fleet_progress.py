"""How a fleet's worker shows itself: its slots, and the whole fleet's pace.

Beside `progress.py`, in whose place it stands for a worker. Invariant: a plain line is complete in
itself.
"""

from __future__ import annotations

import time

from rich.console import Group
from rich.live import Live
from rich.text import Text

from disttrain.engine.fleet_folder import FAILED, FINISHED, FleetFolder
from disttrain.engine.progress import SECONDS_BETWEEN_LINES, Progress, plain_duration

SECONDS_BETWEEN_LOOKS = 1.0


class FleetProgress:
    """A line for each slot and one for the fleet; on a terminal they stay in place."""

    def __init__(self, progress: Progress, folder: FleetFolder, names: list[str]) -> None:
        self.progress, self.folder, self.names = progress, folder, names
        self.slots: list[tuple[str, int, int, float]] = []
        """(subject, step, steps, loss) of those in training here."""
        self.live: Live | None = None
        self._started = time.monotonic()
        self._finished_before: int | None = None
        self._looked = self._said = float("-inf")
        self._total = ""

    def start(self, what: str, total: int, done: int) -> None:
        """A pack begins."""
        if self.progress.live:
            self.live = Live(console=self.progress.console, refresh_per_second=4, transient=True)
            self.live.start()

    def advance(self, done: int, total: int, what: str, detail: str, left: str = "") -> None:
        """After each update."""
        now = time.monotonic()
        if now - self._looked >= SECONDS_BETWEEN_LOOKS:
            self._looked, self._total = now, self._whole(now)
        if self.live is not None:
            rows = [
                f"{name:24} {step}/{of}  loss {loss:.4f}" for name, step, of, loss in self.slots
            ]
            self.live.update(Group(*map(Text, [*rows, f"{self._total}  {detail}"])))
        if now - self._said >= SECONDS_BETWEEN_LINES:
            self._said = now
            here = ", ".join(f"{name} {step}/{of}" for name, step, of, _ in self.slots[:4])
            more = f" and {len(self.slots) - 4} more" if len(self.slots) > 4 else ""
            say = self.progress.say if self.live is None else self.progress.keep
            say(f"{self._total}  {detail}  here: {here}{more}")

    def _whole(self, now: float) -> str:
        """The fleet in a line: how many are done, how fast, how long still."""
        states = [self.folder.read(name).status for name in self.names]
        finished, failed = states.count(FINISHED), states.count(FAILED)
        if self._finished_before is None:
            self._finished_before = finished
        here = finished - self._finished_before
        text = f"fleet {finished}/{len(self.names)}" + (f", {failed} failed" if failed else "")
        if not here:
            return text
        each = (now - self._started) / here
        left = plain_duration(each * (len(self.names) - finished - failed))
        return f"{text}  {3600 / each:.1f} subjects/hour  {left} left"

    def finished(self, name: str, steps: int, loss: float | None) -> None:
        """One line for each result."""
        said = "" if loss is None else f", loss {loss:.4f}"
        self.progress.say(f"finished {name}: {steps} steps{said}")

    def stop(self) -> None:
        """A pack ended."""
        if self.live is not None:
            self.live.stop()
            self.live = None
