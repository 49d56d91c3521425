"""How a training process tells the launch above it with which code it ended, and what that means.

Launchers such as torchrun end with 1 whatever a training process said. So each process keeps a note
in a folder that `disttrain launch` made for it: a file named by its process number, empty while it
works, its exit code at the end. Invariant: a note without a code belongs to a process that is alive
or that was killed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from disttrain.errors import (
    EXIT_DEFECT,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_TRAINING_FAILED,
    EXIT_USER_ERROR,
)

FOLDER = "DISTTRAIN_EXIT_FOLDER"
EXIT_CTRL_C = 130
FINAL = (EXIT_USER_ERROR, EXIT_TRAINING_FAILED)
"""Codes that starting again does not mend."""


def told(command: Callable[[], int]) -> int:
    """Run a command; where a launch asks for it, leave a note of its code, whatever its end."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return command()
    note, number, code = Path(folder) / str(os.getpid()), os.getpid(), EXIT_DEFECT
    _write(note, "")
    try:
        code = command()
    except SystemExit as end:  # argparse ends a command with it
        code = end.code if isinstance(end.code, int) else EXIT_DEFECT
        raise
    finally:
        if os.getpid() == number:  # not in a process that was forked meanwhile
            _write(note, str(code))
    return code


def _write(note: Path, text: str) -> None:
    # The launch may be gone and its folder with it; that is no reason to fail.
    with suppress(OSError):
        note.write_text(text)


def read_notes(folder: Path) -> dict[int, int | None]:
    """Process number -> exit code of each process so far; None of one that did not say any."""
    found: dict[int, int | None] = {}
    for note in folder.iterdir():
        text = note.read_text()
        found[int(note.name)] = int(text) if text.strip() else None
    return found


def meaning(notes: Mapping[int, int | None], launcher: int, stopped: bool) -> int:
    """The code that means most.

    Args:
        notes: what the processes said; with restarts, those that died before are among them.
        launcher: how the launcher itself ended.
        stopped: whether a signal asked for the end. Processes that it killed before they trained
            lost nothing: the same command starts again.
    """
    said = set(notes.values())
    for code in FINAL:
        if code in said:
            return code
    if launcher == EXIT_DONE:
        return EXIT_DONE
    for code in (EXIT_INTERRUPTED, EXIT_CTRL_C):
        if code in said:
            return code
    if stopped and EXIT_DEFECT not in said:
        return EXIT_INTERRUPTED
    return launcher if launcher > 0 else 128 - launcher
