"""Atomic writing, bounded reading and the lock, with real kills."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from disttrain import files
from disttrain.errors import DataError, UserError


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run_python(script: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def fill(folder: Path, text: str) -> None:
    (folder / "inner").mkdir()
    (folder / "a.txt").write_text(text)
    (folder / "inner/b.txt").write_text(text)


def content(folder: Path) -> tuple[str, str]:
    return (folder / "a.txt").read_text(), (folder / "inner/b.txt").read_text()


@contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


def test_file_is_new_after_the_block_and_old_until_then(tmp_path: Path) -> None:
    path = tmp_path / "made/on/the/way.txt"
    files.write_text(path, "old")
    with files.atomic_writer(path) as handle:
        handle.write(b"new")
        handle.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert listed(path.parent) == ["way.txt"]


@pytest.mark.parametrize("before", [None, "old"])
def test_file_is_left_alone_when_the_block_raises(tmp_path: Path, before: str | None) -> None:
    path = tmp_path / "file.txt"
    if before is not None:
        path.write_text(before)

    def interrupted() -> None:
        with files.atomic_writer(path) as handle:
            handle.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert listed(tmp_path) == ([] if before is None else ["file.txt"])
    assert before is None or path.read_text() == before


@pytest.mark.parametrize("before", [None, "old"])
def test_folder_is_left_alone_when_the_block_raises(tmp_path: Path, before: str | None) -> None:
    path = tmp_path / "folder"
    if before is not None:
        path.mkdir()
        fill(path, before)

    def interrupted() -> None:
        with files.atomic_folder(path) as temporary:
            (temporary / "a.txt").write_text("half")
            raise RuntimeError("half")

    with pytest.raises(RuntimeError, match="half"):
        interrupted()
    assert listed(tmp_path) == ([] if before is None else ["folder"])
    assert before is None or content(path) == ("old", "old")


def test_folder_replaces_the_whole_of_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for text in ("old", "new"):
        with files.atomic_folder(path) as temporary:
            fill(temporary, text)
            if text == "old":
                (temporary / "only-old.txt").write_text("")
            assert not path.exists() or content(path) == ("old", "old")
    assert content(path) == ("new", "new")
    assert listed(path) == ["a.txt", "inner"]
    assert listed(tmp_path) == ["folder"]


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from disttrain import files

    kind, path, when = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    real, calls = os.replace, 0

    def replace(source, target):
        global calls
        calls += 1
        if calls == when:
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)

    os.replace = replace
    if kind == "file":
        files.write_bytes(path, b"new" * 1000)
    else:
        with files.atomic_folder(path) as temporary:
            for name in ("a.txt", "b.txt"):
                (temporary / name).write_bytes(b"new" * 1000)
"""


@pytest.mark.parametrize(
    ("kind", "old", "when"),
    [("file", True, 1), ("file", False, 1), ("folder", False, 1), ("folder", True, 1)],
)
def test_kill_between_write_and_rename_leaves_what_was_there(
    tmp_path: Path, kind: str, old: bool, when: int
) -> None:
    path = tmp_path / "target"
    if old and kind == "file":
        path.write_text("old")
    elif old:
        path.mkdir()
        (path / "a.txt").write_text("old")
    done = run_python(KILLED, Path(kind), path, Path(str(when)))
    assert done.returncode == -signal.SIGKILL, done.stderr
    names = listed(tmp_path)
    left = [name for name in names if name.startswith(".target.") and name.endswith(".tmp")]
    assert left, "the planted kill comes after the writing"
    assert sorted(set(names) - set(left)) == (["target"] if old else [])
    if old:
        assert (path if kind == "file" else path / "a.txt").read_text() == "old"
    files.remove_temporaries(tmp_path)
    assert listed(tmp_path) == (["target"] if old else [])


def test_kill_between_the_two_renames_leaves_no_half_folder(tmp_path: Path) -> None:
    path = tmp_path / "target"
    path.mkdir()
    (path / "a.txt").write_text("old")
    done = run_python(KILLED, Path("folder"), path, Path("2"))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not path.exists()
    with files.atomic_folder(path) as temporary:
        fill(temporary, "third")
    assert content(path) == ("third", "third")


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o027, 0o002])
def test_modes_honour_umask(tmp_path: Path, mask: int) -> None:
    with umask(mask):
        files.write_text(tmp_path / "file", "x")
        with files.atomic_folder(tmp_path / "folder") as temporary:
            files.write_text(temporary / "inner", "x")
        assert os.umask(mask) == mask, "the mask itself must stay as it was"
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "folder")]
    assert modes == [0o666 & ~mask, 0o777 & ~mask]
    assert stat.S_IMODE((tmp_path / "folder/inner").stat().st_mode) == 0o666 & ~mask


def test_remove_temporaries_takes_only_what_killed_writers_left(tmp_path: Path) -> None:
    kept = [".hidden", "plain.tmp", "file.txt", ".lock", "sub"]
    for name in kept[:-1]:
        (tmp_path / name).touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/.deep.x.tmp").mkdir()
    (tmp_path / "sub/.deep.x.tmp/.inner.y.tmp").touch()
    (tmp_path / "sub/kept").touch()
    (tmp_path / ".file.txt.a1.tmp").touch()
    (tmp_path / ".folder.b2.tmp/old").mkdir(parents=True)
    (tmp_path / ".folder.b2.tmp/old/file").touch()
    files.remove_temporaries(tmp_path)
    assert listed(tmp_path) == sorted(kept)
    assert listed(tmp_path / "sub") == ["kept"]


def test_remove_folder_never_leaves_half_of_it_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    fill(path, "old")

    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", crash)
        with pytest.raises(KeyboardInterrupt):
            files.remove_folder(path)
    assert not path.exists()
    files.remove_temporaries(tmp_path)
    assert listed(tmp_path) == []


def test_json_and_tensors_come_back_as_written(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, "ä"], "b": {"c": True}}
    files.write_json(tmp_path / "value.json", value)
    assert files.read_json(tmp_path / "value.json") == value
    assert "ä" in (tmp_path / "value.json").read_text(encoding="utf-8")
    tensors = {"x": torch.arange(6.0).view(2, 3).t(), "y": torch.ones(2, dtype=torch.bfloat16)}
    files.write_tensors(tmp_path / "value.safetensors", tensors, {"key": "text"})
    found = files.read_tensors(tmp_path / "value.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert found["y"].dtype == torch.bfloat16


def test_text_of_windows_editors_is_read_without_its_mark(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf{}")
    assert files.read_text(path) == "{}"
    assert files.read_json(path) == {}


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"", "not JSON (line 1: Expecting value)"),
        (b'{\n"a": }', "not JSON (line 2: Expecting value)"),
        (b"[" * 100_000, "JSON nested too deeply"),
        (b"9" * 5000, "not JSON (Exceeds the limit"),
        (b"\xff{}", "not UTF-8 text (byte 0); save it as UTF-8"),
        (b"[" + b" " * 100_000 + b"]", "100002 bytes of text, the limit is 100001"),
    ],
)
def test_unreadable_json_is_one_line(tmp_path: Path, content: bytes, fragment: str) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        files.read_json(path, limit=100_001)
    assert str(caught.value).startswith(f"{path}: {fragment}")
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders_are_one_line(tmp_path: Path) -> None:
    for path, problem in ((tmp_path / "absent", "No such file"), (tmp_path, "Is a directory")):
        for read in (files.read_text, files.read_json):
            with pytest.raises(DataError) as caught:
                read(path)
            assert str(caught.value).startswith(f"{path}: {problem}")
        with pytest.raises(DataError) as caught:
            files.read_tensors(path)
        assert str(caught.value).startswith(f"{path}: not a readable safetensors file")


def test_damaged_safetensors_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    files.write_tensors(path, {"x": torch.zeros(100)})
    whole = path.read_bytes()
    for damaged in (b"", whole[:4], whole[:40], whole[:-1], b"\xff" * 200, b"\0" * 200):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"not a readable safetensors file") as caught:
            files.read_tensors(path)
        assert "\n" not in str(caught.value)


def test_digests(tmp_path: Path) -> None:
    path = tmp_path / "big"
    path.write_bytes(b"abc" * 700_000)  # over two blocks
    assert files.sha256_file(path) == files.sha256_bytes(b"abc" * 700_000)
    assert files.sha256_bytes(b"abc").startswith("ba7816bf8f01cfea414140de5dae2223")
    assert files.digest_of({"a": 1, "b": [2]}) == files.digest_of({"b": [2], "a": 1})
    assert files.digest_of({"a": 1}) != files.digest_of({"a": "1"})


HOLDER = """
    import sys, time
    from pathlib import Path
    from disttrain.files import FolderLock

    lock = FolderLock(Path(sys.argv[1]))
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of `tmp_path/run`."""
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_second_process_is_refused_at_once_and_told_by_whom(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    started = time.monotonic()
    for _ in range(2):  # a refusal must not wipe the owner's name
        with pytest.raises(UserError) as caught:
            files.FolderLock(tmp_path / "run")
        assert f"is in use by process {holder.pid} on " in str(caught.value)
    assert time.monotonic() - started < 1


def test_killed_owner_leaves_the_lock_free(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait(timeout=10)
    files.FolderLock(tmp_path / "run").release()


def test_released_lock_is_free_and_releasing_twice_is_harmless(tmp_path: Path) -> None:
    lock = files.FolderLock(tmp_path / "run")
    with pytest.raises(UserError, match=f"process {os.getpid()} on "):
        files.FolderLock(tmp_path / "run")
    lock.release()
    lock.release()
    files.FolderLock(tmp_path / "run").release()
