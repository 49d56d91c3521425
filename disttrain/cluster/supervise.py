"""Runs the processes of one node: starts them, carries signals to them, tells how they ended.

Below `node.py`. The launcher runs in a session of its own, so that Ctrl-C reaches this process
alone, and a stop goes to the training processes themselves: launchers would die of USR1, and kill
their processes soon after TERM. Invariant: when `supervise` returns, no process it started lives.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from disttrain.cluster.exit_codes import FINAL, FOLDER, meaning, read_notes
from disttrain.cluster.launch import Command
from disttrain.errors import EXIT_INTERRUPTED

GENTLE = (signal.SIGUSR1, signal.SIGUSR2)
WATCHED = (*GENTLE, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LOOK_EVERY = 0.1
REPEAT_EVERY = 1.0
END_SECONDS = 90.0
"""More than a launcher gives its processes after TERM."""


class StopSignals:
    """Collects the signals that ask for an end; a context manager around all of a launch."""

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        for watched in WATCHED:
            self._previous[watched] = signal.signal(watched, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for watched, handler in self._previous.items():
            signal.signal(watched, handler)  # type: ignore[arg-type]

    def any(self) -> bool:
        """Whether one came."""
        return bool(self.received)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.received.append(signal.Signals(number))


def supervise(
    commands: Sequence[Command],
    environment: Mapping[str, str],
    signals: StopSignals,
    restarts: bool,
) -> tuple[int, bool]:
    """Start the commands and stay until all have ended.

    Args:
        restarts: whether the command starts processes again that die.

    Returns:
        The exit code that means most, and whether any training process began.
    """
    with tempfile.TemporaryDirectory(prefix="disttrain-exit-") as name:
        node = _Node(Path(name), signals, restarts)
        try:
            for command in commands:
                node.start(command, environment)
            node.watch()
        finally:
            node.end()
        notes = read_notes(node.folder)
        codes = [child.returncode for child in node.children]
        worst = next((code for code in codes if code), 0)
        return meaning(notes, worst, signals.any()), bool(notes)


class _Node:
    """What runs on this node."""

    def __init__(self, folder: Path, signals: StopSignals, restarts: bool) -> None:
        self.folder, self.signals, self.restarts = folder, signals, restarts
        self.children: list[subprocess.Popen[bytes]] = []
        self._seen = 0
        self._repeated = 0.0
        self._told_to_end = False

    def start(self, command: Command, environment: Mapping[str, str]) -> None:
        self.children.append(
            subprocess.Popen(
                command.arguments,
                env={**environment, **command.environment, FOLDER: str(self.folder)},
                start_new_session=True,
                preexec_fn=_ignore_gentle_signals,
            )
        )

    def watch(self) -> None:
        """Until every child has ended by itself."""
        while self._alive():
            self._carry_signals()
            self._prevent_useless_restarts()
            time.sleep(LOOK_EVERY)

    def end(self) -> None:
        """Leave nothing behind."""
        if self._alive():
            self._tell_launchers(signal.SIGTERM)
            deadline = time.monotonic() + END_SECONDS
            while self._alive() and time.monotonic() < deadline:
                time.sleep(LOOK_EVERY)
        for number in self._training():
            _send(number, signal.SIGKILL)
        for child in self._alive():
            child.kill()
        for child in self.children:
            child.wait()

    def _alive(self) -> list[subprocess.Popen[bytes]]:
        return [child for child in self.children if child.poll() is None]

    def _training(self) -> list[int]:
        """Training processes that did not end yet."""
        return [number for number, code in read_notes(self.folder).items() if code is None]

    def _carry_signals(self) -> None:
        """Hand on what came. A gentle signal is repeated, because a process that is still loading
        ignores it; it harms none that is ending."""
        received = self.signals.received
        while self._seen < len(received):
            came = received[self._seen]
            self._seen += 1
            if came in GENTLE:
                self._repeated = 0.0
            elif received[: self._seen].count(came) > 1:  # somebody insists
                self._tell_launchers(signal.SIGTERM)
            elif not self._tell_training(came):
                self._tell_launchers(came)
        gentle = [came for came in received if came in GENTLE]
        if gentle and time.monotonic() - self._repeated >= REPEAT_EVERY:
            self._repeated = time.monotonic()
            self._tell_training(gentle[0])

    def _prevent_useless_restarts(self) -> None:
        """A launcher that restarts dead processes would restart those that ended with reason."""
        if not self.restarts or self._told_to_end:
            return
        notes = read_notes(self.folder)
        ended = any(code in (*FINAL, EXIT_INTERRUPTED) for code in notes.values())
        killed = self.signals.any() and not any(map(_lives, notes)) and notes
        if ended or killed:
            self._told_to_end = True
            self._tell_launchers(signal.SIGTERM)

    def _tell_training(self, number: signal.Signals) -> int:
        """How many heard it. A lost terminal is a reason to stop like any other."""
        number = signal.SIGTERM if number == signal.SIGHUP else number
        return sum([_send(process, number) for process in self._training()])

    def _tell_launchers(self, number: signal.Signals) -> None:
        for child in self._alive():
            child.send_signal(number)


def _ignore_gentle_signals() -> None:
    """In the child: launchers would die of these; a training process installs its own handler."""
    for gentle in GENTLE:
        signal.signal(gentle, signal.SIG_IGN)


def _send(process: int, number: signal.Signals) -> bool:
    with suppress(ProcessLookupError):
        os.kill(process, number)
        return True
    return False


def _lives(process: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(process, 0)
        return True
    return False
