"""The lab itself: it says where it cannot run, and does not outlive the one who started it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from conftest import clean_environment
from lab import HERE, Lab, wait_until


def hosts_of(folder: Path) -> list[int]:
    """Processes of hosts whose lab lies in this folder."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(folder).encode() in words and any(word.endswith(b"host.sh") for word in words):
            found.append(int(place.name))
    return found


def test_a_lab_that_was_left_is_ended_by_the_next(lab: Lab) -> None:
    folder = lab.folder / "left"
    first = Lab(nodes=1, folder=folder, dies_with_us=False)
    first.start()
    left = set(hosts_of(folder))
    assert left
    with Lab(nodes=1, folder=folder) as second:
        assert second.run("srun", "hostname").stdout == "node1\n"
        assert not left & set(hosts_of(folder))
    wait_until("all hosts end", lambda: not hosts_of(folder), 10)


def test_hosts_end_with_the_process_that_started_them(lab: Lab) -> None:
    folder = lab.folder / "killed"
    script = (
        "import sys, pathlib, time; from lab import Lab; "
        "Lab(nodes=1, folder=pathlib.Path(sys.argv[1])).start(); print('up', flush=True); "
        "time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, folder], cwd=HERE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    assert hosts_of(folder)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until("all hosts end", lambda: not hosts_of(folder), 10)


def test_who_may_not_is_told() -> None:
    command = ["setpriv", "--reuid=65534", "--clear-groups", sys.executable, HERE / "lab.py"]
    done = subprocess.run(
        [*command, "start"], env=clean_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "cluster lab: needs root" in done.stderr
