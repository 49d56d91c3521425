"""A base model on slow shared storage is copied once to each machine, and loaded from there.

Between `base.py`, which finds the model, and the loaders. Asked for by DISTTRAIN_LOCAL_CACHE, a
folder on the machine's own disk. Invariant: a copy is whole and of the files as they are now, or
the original is used; of one model there is one copy, but for older ones that are still in use.

    CACHE/base-models/PLACE/CONTENT/NAME    the copy; PLACE is of the original's path, CONTENT of
                                            its files' names, sizes and times
    CACHE/base-models/PLACE/CONTENT/.used   kept open by every process that loads from the copy
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from disttrain.files import (
    atomic_folder,
    digest_of,
    exclusively,
    keep_in_use,
    remove_folder,
    remove_temporaries,
    remove_unused,
)

VARIABLE = "DISTTRAIN_LOCAL_CACHE"
LONGEST_WAIT = 1200.0
SPARE = 256 * 2**20
"""Bytes that a copy leaves free."""
SMALL_FILES = (".json", ".txt", ".model")
USED = ".used"
Say = Callable[[str], None]
Files = dict[str, tuple[Path, int, int]]
"""Original, size and time of last change by the name that the file has in the copy."""


def silent(_: str) -> None:
    """Says nothing."""


def near(source: Path, weights: list[list[str]], say: Say = silent, warn: Say = silent) -> Path:
    """Where to load a base model from: its copy on this machine, or `source` itself.

    Args:
        source: a folder or a file.
        weights: of a folder, for each part its possible weight files, the preferred one first.
        say: told in one line when a copy is made.
        warn: told in one line why there is no copy though one was asked for.
    """
    asked = os.environ.get(VARIABLE, "")
    if not asked:
        return source
    try:
        files = _files(source, weights)
        if not files:  # loading it will say what it lacks
            return source
        return _copied(source, files, Path(asked).expanduser().absolute(), say)
    except OSError as error:
        reason = error.strerror or error
        warn(f"{VARIABLE}: {socket.gethostname()} loads {source} itself, not a copy ({reason})")
        return source


def _files(source: Path, weights: list[list[str]]) -> Files:
    """What loading reads: every small file, and the weights it would choose."""
    if source.is_file():
        chosen = {".": source}
    else:
        found = [next((n for n in names if (source / n).is_file()), None) for names in weights]
        chosen = {name: source / name for name in found if name is not None}
        if chosen:
            small = [p for p in _at_most_two_deep(source) if p.suffix in SMALL_FILES]
            chosen |= {str(path.relative_to(source)): path for path in small}
    status = {name: path.stat() for name, path in sorted(chosen.items())}
    return {name: (chosen[name], s.st_size, s.st_mtime_ns) for name, s in status.items()}


def _at_most_two_deep(folder: Path) -> Iterator[Path]:
    for pattern in ("*", "*/*"):
        yield from (path for path in folder.glob(pattern) if path.is_file())


def _copied(source: Path, files: Files, cache: Path, say: Say) -> Path:
    """The copy, made now unless it is there.

    Raises:
        OSError: there is no room, or the copy cannot be made; nothing of it stays.
    """
    original = source.resolve()
    siblings = cache / "base-models" / digest_of(str(original))[:24]
    described = {name: [size, changed] for name, (_, size, changed) in files.items()}
    content = siblings / digest_of(described)[:24]
    need = sum(size for _, size, _ in files.values())
    if not content.is_dir():
        # Before the lock: the process that shows it may wait while another one copies.
        size = f"{need / 2**30:.2f} GiB"
        say(f"copying base model {source} ({size}) once to {socket.gethostname()}:{content}")
    with exclusively(siblings / ".lock", LONGEST_WAIT):
        if not _whole(content / source.name, files):
            _make_room(siblings, need)
            _make(content, source.name, files)
        # Open, and so in use, until this process ends: parts of the model are read when needed.
        if content not in _IN_USE:
            _IN_USE[content] = os.open(content / USED, os.O_RDONLY)
            keep_in_use(_IN_USE[content])
    return content / source.name


_IN_USE: dict[Path, int] = {}
"""Descriptors of the copies that this process uses, one each."""


def _whole(copy: Path, files: Files) -> bool:
    """Whether the copy is there, and nothing that tidies old files up has been at it."""
    try:
        (copy.parent / USED).stat()
        return all((copy / name).stat().st_size == size for name, (_, size, _) in files.items())
    except (FileNotFoundError, NotADirectoryError):
        return False


def _make_room(siblings: Path, need: int) -> None:
    """Remove what killed processes left, and older copies that nobody uses."""
    remove_temporaries(siblings)
    for old in siblings.iterdir():
        if old.is_dir() and remove_unused(old / USED):
            remove_folder(old)
    free = shutil.disk_usage(siblings).free
    if free < need + SPARE:
        raise OSError(f"{siblings} has {free} bytes free, {need + SPARE} are needed")


def _make(content: Path, name: str, files: Files) -> None:
    with atomic_folder(content) as temporary:
        for relative, (path, size, changed) in files.items():
            target = temporary / name / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            now = path.stat()
            if (now.st_size, now.st_mtime_ns, target.stat().st_size) != (size, changed, size):
                raise OSError(f"{path} changed while it was copied")
        (temporary / USED).touch()
