"""Logs of ranks and workers, seen from processes of their own."""

from __future__ import annotations

import os
import pty
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, clean_environment, disttrain, run_command, small_config, write_config

HOST = socket.gethostname()
SCRIPT = """
import ctypes, logging, os, subprocess, sys
from pathlib import Path
from disttrain.engine.progress import Progress
from disttrain.engine.rank_logs import rank_log
from disttrain.errors import UserError

folder, rank, words = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
progress = Progress(shown=rank == 0)
logging.basicConfig()
print("before")
try:
    with rank_log(folder, rank, 2, progress):
        print("python out")
        print("python err", file=sys.stderr)
        logging.warning("library")
        if "full" not in words:
            os.write(2, b"descriptor\\n")
            subprocess.run(["echo", "child"], check=True)
        libc = ctypes.CDLL(None)
        libc.puts(b"from c")
        libc.fflush(None)
        sys.stderr.write("half\\rwhole\\n")
        progress.say("said")
        progress.warn_from(rank, "careful")
        if "user" in words:
            raise UserError("mend it")
        if "defect" in words:
            raise RuntimeError("a defect")
        if "crash" in words:
            ctypes.string_at(0)
finally:
    print("after")
    print("after err", file=sys.stderr)
"""


def speak(folder: Path, rank: int, *words: str) -> tuple[int, str, str]:
    command = [sys.executable, "-c", SCRIPT, folder, str(rank), *words]
    done = run_command(*command, PYTHONPATH=str(ROOT))
    return done.returncode, done.stdout, done.stderr


def log_of(folder: Path, rank: int) -> str:
    return (folder / f"rank-{rank}-{HOST}.log").read_text()


def test_another_rank_writes_into_its_file_and_warns_on_the_terminal(tmp_path: Path) -> None:
    code, out, errors = speak(tmp_path / "logs", 1)
    assert (code, out) == (0, "before\nafter\n")
    assert errors == f"[{HOST} rank 1] warning: careful\nafter err\n"
    lines = log_of(tmp_path / "logs", 1).splitlines()
    assert lines[0].startswith("=== ")
    assert lines[0].endswith(f" on {HOST}, process {lines[0].rpartition(' ')[2]}")
    assert "rank 1 of 2" in lines[0]
    assert lines[1:] == [
        "python out",
        "python err",
        "WARNING:root:library",
        "descriptor",
        "child",
        "from c",
        "half",
        "whole",
        "said",
        f"[{HOST} rank 1] warning: careful",
    ]


def test_rank_zero_keeps_its_terminal_and_leaves_a_copy(tmp_path: Path) -> None:
    code, out, errors = speak(tmp_path, 0)
    assert code == 0
    for line in ("python out", "from c", "child", "said", "warning: careful", "after"):
        assert f"{line}\n" in out
    assert errors.startswith("python err\nWARNING:root:library\ndescriptor\nhalf\nwhole\n")
    lines = log_of(tmp_path, 0).splitlines()
    assert lines[1:] == ["python err", "whole", "said", "warning: careful"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_restart_appends(rank: int, tmp_path: Path) -> None:
    for _ in range(2):
        assert speak(tmp_path, rank)[0] == 0
    text = log_of(tmp_path, rank)
    assert text.count("=== ") == text.count("\nsaid\n") == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_the_last_words_are_in_the_log_and_on_the_terminal(rank: int, tmp_path: Path) -> None:
    code, _, errors = speak(tmp_path, rank, "user")
    assert code == 1
    assert log_of(tmp_path, rank).endswith("\ndisttrain: mend it\n")
    assert "mend it" in errors
    code, _, errors = speak(tmp_path, rank, "defect")
    assert code == 1
    assert "Traceback" in log_of(tmp_path, rank)
    assert log_of(tmp_path, rank).endswith("\nRuntimeError: a defect\n")
    assert errors.endswith("\nRuntimeError: a defect\n")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_crash_leaves_its_stack_in_the_log(rank: int, tmp_path: Path) -> None:
    code, _, _ = speak(tmp_path, rank, "crash")
    assert code < 0
    text = log_of(tmp_path, rank)
    assert "Fatal Python error: Segmentation fault" in text
    assert 'File "<string>", line ' in text


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_is_said_once_and_stops_nothing(rank: int, tmp_path: Path) -> None:
    (tmp_path / f"rank-{rank}-{HOST}.log").symlink_to("/dev/full")
    code, out, errors = speak(tmp_path, rank, "full")
    assert code == 0
    assert out.endswith("after\n")
    assert errors.count("No space left on device; going on without this log") == 1
    assert "careful" in out + errors


@pytest.mark.parametrize("rank", [0, 1])
def test_a_folder_that_cannot_be_made_is_said_once_and_stops_nothing(
    rank: int, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    code, out, errors = speak(tmp_path / "file/logs", rank)
    assert code == 0
    assert "python out\n" in out
    assert errors.count("going on without this log") == 1


def test_one_process_has_a_log_of_plain_lines_and_its_terminal_is_live(tmp_path: Path) -> None:
    """On a terminal the bar moves; none of its control codes are in the file."""
    tree = small_config("lora", tmp_path, max_steps=2, checkpoint_every=2)
    config = write_config(tree, tmp_path / "config.yaml")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "disttrain", "train", str(config)],
        cwd=ROOT,
        env=clean_environment(TERM="xterm"),
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 2**16)
        except OSError:  # Linux's end of a terminal that everybody left
            break
    os.close(ours)
    assert process.wait() == 0, shown
    assert b"\x1b[" in shown
    text = (tmp_path / f"lora/logs/rank-0-{HOST}.log").read_text()
    assert "\x1b" not in text
    assert "\r" not in text
    assert "\nlora fox 2/2  loss " in text
    assert "\nrun folder " in text
    assert "\nresult      " in text


def test_a_worker_of_a_fleet_has_its_log(tmp_path: Path) -> None:
    from conftest import SETTINGS

    tree = small_config("lora", tmp_path, max_steps=1, checkpoint_every=1)
    (subject,) = tree.pop("subjects")
    assert SETTINGS["lora"]["token"] == subject["token"]
    config = write_config(tree, tmp_path / "config.yaml")
    manifest = tmp_path / "manifest.csv"
    manifest.write_text(
        "name,images,token,class_name\n" + f"fox,{subject['images']},sks,fox\n", encoding="utf-8"
    )
    done = disttrain("fleet", manifest, config)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "lora/logs").iterdir()
    assert path.name.startswith(f"worker-{HOST}-")
    text = path.read_text()
    assert text.startswith("=== ")
    assert "worker of a fleet on " in text
    assert "\nfleet of 1 subjects in " in text
    assert "\nfinished fox: 1 steps" in text
