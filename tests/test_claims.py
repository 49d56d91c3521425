"""Leases of subjects: one holder at a time, whoever is killed, stopped or slow."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from disttrain.engine.claims import Claims
from disttrain.engine.distributed import WorkerPlace
from disttrain.files import exclusively

LONG = 60.0
"""A lease that cannot run out during a test."""
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["disttrain.engine.claims"])


def claims_of(
    folder: Path, seconds: float = LONG, number: int = 0, count: int = 1, static: bool = False
) -> Claims:
    return Claims(folder, seconds, WorkerPlace(number, count), static)


def anything(_: str, __: list[str]) -> bool:
    return True


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


def age(path: Path, seconds: float) -> None:
    """Let the newest sign of life be so long ago."""
    then = time.time() - seconds
    os.utime(path, (then, then))


def work(folder: Path, names: list[str], number: int) -> None:
    """Do every subject that is left. Two that do one at a time, or one again, leave a complaint."""
    with claims_of(folder / "claims", number=number) as claims:

        def wanted(name: str, _: list[str]) -> bool:
            return not (folder / "done" / name).exists()

        while found := claims.take(names, 3, wanted):
            for name in found:
                with (folder / "busy" / name).open("w") as busy:
                    try:
                        fcntl.flock(busy, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        time.sleep(random.uniform(0.001, 0.004))
                        assert claims.holds(name)
                        (folder / "done" / name).touch(exist_ok=False)
                    except (OSError, AssertionError) as error:
                        (folder / "complaints" / f"{name}-{os.getpid()}").write_text(repr(error))
                claims.release([name])
            with (folder / "counts").open("a") as counts:
                counts.write("".join(f"{number} {name}\n" for name in found))


def start(folder: Path, names: list[str], number: int) -> ForkServerProcess:
    process = PROCESSES.Process(target=work, args=(folder, names, number))
    process.start()
    return process


def workplace(folder: Path) -> Path:
    for name in ("claims", "busy", "done", "complaints"):
        (folder / name).mkdir()
    return folder


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_each_subject_goes_to_one_of_many_workers(tmp_path: Path) -> None:
    names = [f"s{number:03}" for number in range(300)]
    folder = workplace(tmp_path)
    workers = [start(folder, names, number) for number in range(4)]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert files(folder / "complaints") == []
    assert files(folder / "done") == names
    lines = [line.split() for line in (folder / "counts").read_text().splitlines()]
    assert sorted(name for _, name in lines) == names
    assert len(Counter(number for number, _ in lines)) > 1, "one worker did all"
    assert files(folder / "claims") == []


def test_subjects_of_killed_workers_are_done_once(tmp_path: Path) -> None:
    """Leases are long: what a dead worker of this machine had is taken over at once."""
    names = [f"s{number:03}" for number in range(400)]
    folder = workplace(tmp_path)
    workers = [start(folder, names, number) for number in range(4)]
    chance = random.Random(0)
    kills = 0
    while kills < 10 and len(files(folder / "done")) < 300:
        time.sleep(0.02)
        victim = chance.randrange(len(workers))
        process = workers[victim]
        if process.is_alive() and len(files(folder / "done")) > 20:
            process.kill()
            kills += 1
            workers[victim] = start(folder, names, victim)
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert kills > 2
    with claims_of(folder / "claims") as claims:  # what the last one killed had, if all had ended
        claims.release(claims.take(names, len(names), anything))
    work(folder, names, 9)
    assert files(folder / "complaints") == []
    assert files(folder / "done") == names


def hold(folder: Path, seconds: float, pipe: Connection) -> None:
    """Claim one subject; then, at each word, say whether it is still held; at the end give back."""
    with claims_of(folder, seconds, number=1) as claims:
        pipe.send(claims.take(["fox"], 1, anything))
        while pipe.recv():
            pipe.send(claims.holds("fox"))
    pipe.send("left")


@contextmanager
def holder(folder: Path, seconds: float) -> Iterator[tuple[int, Connection]]:
    """Another process that holds a subject: its number, and a pipe to it."""
    here, there = PROCESSES.Pipe()
    process = PROCESSES.Process(target=hold, args=(folder, seconds, there))
    process.start()
    assert here.recv() == ["fox"]
    assert process.pid is not None
    try:
        yield process.pid, here
    finally:
        process.kill()
        process.join()


def test_a_killed_holder_is_followed_at_once(tmp_path: Path) -> None:
    with holder(tmp_path, LONG) as (process, _), claims_of(tmp_path) as claims:
        assert claims.take(["fox"], 1, anything) == []
        os.kill(process, signal.SIGKILL)
        began = time.monotonic()
        until(lambda: claims.take(["fox"], 1, anything) == ["fox"], 5)
        assert time.monotonic() - began < 5


def test_one_that_slept_too_long_has_lost_its_subject(tmp_path: Path) -> None:
    with holder(tmp_path, 0.8) as (process, pipe), claims_of(tmp_path) as claims:
        pipe.send(True)
        assert pipe.recv() is True
        os.kill(process, signal.SIGSTOP)
        stopped = time.monotonic()
        until(lambda: claims.take(["fox"], 1, anything) == ["fox"])
        assert time.monotonic() - stopped > 0.5
        os.kill(process, signal.SIGCONT)
        pipe.send(True)
        assert pipe.recv() is False
        pipe.send(False)
        assert pipe.recv() == "left"
        assert claims.holds("fox")
        assert files(tmp_path) == ["fox.json"]


def test_a_heartbeat_keeps_a_lease_beyond_its_length(tmp_path: Path) -> None:
    with claims_of(tmp_path, 0.6) as first, claims_of(tmp_path, 0.6, number=1) as second:
        assert first.take(["fox"], 1, anything) == ["fox"]
        end = time.monotonic() + 2
        while time.monotonic() < end:
            assert second.take(["fox"], 1, anything) == []
            time.sleep(0.02)
        first.release(["fox"])
        assert not first.holds("fox")
        assert second.take(["fox"], 1, anything) == ["fox"]


def test_a_heartbeat_does_not_wait_for_the_lock(tmp_path: Path) -> None:
    """Workers that look through thousands of subjects may keep the lock for longer than a lease."""
    with claims_of(tmp_path, 0.4) as claims:
        claims.take(["fox"], 1, anything)
        with exclusively(tmp_path / ".lock"):
            age(tmp_path / "fox.json", 100)
            until(lambda: time.time() - (tmp_path / "fox.json").stat().st_mtime < 50, 5)


def test_who_asks_whether_it_holds_a_subject_has_a_lease_from_then(tmp_path: Path) -> None:
    with claims_of(tmp_path) as first, claims_of(tmp_path, number=1) as second:
        first.take(["fox"], 1, anything)
        age(tmp_path / "fox.json", 2 * LONG)
        assert first.holds("fox")
        assert second.take(["fox"], 1, anything) == []
        age(tmp_path / "fox.json", 2 * LONG)
        assert second.take(["fox"], 1, anything) == ["fox"]
        assert not first.holds("fox")


def test_at_most_as_many_as_asked_and_only_those_wanted(tmp_path: Path) -> None:
    names = [f"s{number}" for number in range(9)]

    def odd(name: str, taken: list[str]) -> bool:
        assert taken == [other for other in names if other < name and int(other[1:]) % 2]
        return int(name[1:]) % 2 == 1

    with claims_of(tmp_path) as claims:
        assert claims.take(names, 3, odd) == ["s1", "s3", "s5"]
        assert claims.take(names, 9, anything) == ["s0", "s2", "s4", "s6", "s7", "s8"]
        assert claims.take(names, 9, anything) == []
    assert files(tmp_path) == []


def mark(**changed: Any) -> dict[str, Any]:
    """A claim of another worker that gave its last sign of life just now."""
    usual = {"worker": "7@far:1", "space": "elsewhere", "process": 1, "seconds": 30, "token": "t"}
    return {**usual, **changed}


def test_on_another_machine_only_the_lease_tells_that_a_worker_died(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    path = tmp_path / "fox.json"
    path.write_text(json.dumps(mark(process=ended.pid)))
    with claims_of(tmp_path, 1) as claims:
        assert claims.take(["fox"], 1, anything) == []
        age(path, 25)
        assert claims.take(["fox"], 1, anything) == [], "the holder's lease counts, not the taker's"
        age(path, 35)
        assert claims.take(["fox"], 1, anything) == ["fox"]


def test_a_worker_that_nobody_buried_is_dead(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    until(lambda: Path(f"/proc/{ended.pid}/stat").read_text().split()[2] == "Z")
    with claims_of(tmp_path) as claims:
        text = json.dumps(mark(space=claims.space, process=ended.pid))
        (tmp_path / "fox.json").write_text(text)
        assert claims.take(["fox"], 1, anything) == ["fox"]
    ended.wait()


def test_a_worker_is_dead_when_its_last_thread_is(tmp_path: Path) -> None:
    """A killed worker's first thread ends before the others have let go of its files."""
    program = (
        "import ctypes, threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "ctypes.CDLL(None).pthread_exit(None)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    until(lambda: Path(f"/proc/{process.pid}/stat").read_text().split()[2] == "Z")
    with claims_of(tmp_path) as claims:
        text = json.dumps(mark(space=claims.space, process=process.pid))
        (tmp_path / "fox.json").write_text(text)
        assert claims.take(["fox"], 1, anything) == []
        process.kill()
        until(lambda: claims.take(["fox"], 1, anything) == ["fox"])
    process.wait()


def test_another_process_of_the_same_number_is_not_the_worker(tmp_path: Path) -> None:
    with claims_of(tmp_path) as claims, claims_of(tmp_path, number=1) as other:
        other.take(["fox"], 1, anything)
        path = tmp_path / "fox.json"
        assert claims.take(["fox"], 1, anything) == []
        path.write_text(json.dumps({**json.loads(path.read_text()), "started": "12"}))
        assert claims.take(["fox"], 1, anything) == ["fox"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        "null",
        "\x00\xff",
        '{"seconds": "soon"}',
        '{"seconds": NaN}',
        '{"seconds": -1}',
        '{"space": "HERE"}',
        '{"space": "HERE", "process": "x"}',
        '{"space": "HERE", "process": -1}',
        '{"space": "HERE", "process": 99999999999999999999}',
        '{"worker": ["x"], "token": {}}',
    ],
)
def test_a_damaged_claim_runs_out_like_any_other(text: str, tmp_path: Path) -> None:
    path = tmp_path / "fox.json"
    with claims_of(tmp_path) as claims:
        path.write_text(text.replace("HERE", claims.space), encoding="latin-1")
        assert claims.take(["fox"], 1, anything) == []
        assert list(claims.owners()) == ["fox"]
        age(path, 1.5 * LONG)
        assert claims.owners() == {}
        assert claims.take(["fox"], 1, anything) == ["fox"]
        assert claims.holds("fox")


def test_the_time_of_the_file_system_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with claims_of(tmp_path) as first, claims_of(tmp_path, number=1) as second:
        first.take(["fox"], 1, anything)
        (tmp_path / "owl.json").write_text(json.dumps(mark()))
        age(tmp_path / "owl.json", 100)
        for jump in (1e6, -1e6):
            real = time.time
            with monkeypatch.context() as patch:
                patch.setattr(time, "time", lambda real=real, jump=jump: real() + jump)
                assert second.take(["fox"], 1, anything) == []
                assert list(second.owners()) == ["fox"]
        monkeypatch.setattr(time, "time", lambda: 0.0)
        assert second.take(["owl"], 1, anything) == ["owl"]


def test_static_splits_by_number_and_looks_at_no_lease(tmp_path: Path) -> None:
    names = [f"s{number}" for number in range(10)]
    (tmp_path / "s4.json").write_text(json.dumps(mark()))
    parts = []
    for number in range(3):
        with claims_of(tmp_path, LONG, number, 3, static=True) as claims:
            parts.append(claims.take(names, 99, anything))
            assert all(claims.holds(name) for name in parts[-1])
    assert parts == [names[0::3], names[1::3], names[2::3]]
    assert list(tmp_path.iterdir()) == [], "locks cannot be relied on there, so there are none"


def test_of_two_with_one_static_number_the_later_holds(tmp_path: Path) -> None:
    with claims_of(tmp_path, static=True) as first, claims_of(tmp_path, static=True) as second:
        assert first.take(["fox"], 1, anything) == second.take(["fox"], 1, anything) == ["fox"]
        assert not first.holds("fox")
        first.release(["fox"])
        assert second.holds("fox")


def test_owners_are_those_who_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    viewer = claims_of(tmp_path / "absent", 0)
    assert viewer.owners() == {}
    assert not (tmp_path / "absent").exists(), "looking makes nothing"
    viewer = claims_of(tmp_path, 0)
    with holder(tmp_path, LONG) as (process, _), claims_of(tmp_path, number=4) as claims:
        claims.take(["a.b"], 1, anything)
        (tmp_path / "far.json").write_text(json.dumps(mark()))
        (tmp_path / "late.json").write_text(json.dumps(mark()))
        age(tmp_path / "late.json", 31)
        (tmp_path / ".fox.json.x.tmp").write_text("{}")
        expected = {"a.b": claims.worker, "far": "7@far:1"}
        found = viewer.owners()
        assert found.pop("fox").startswith("1@")
        assert found == expected
        assert claims.worker.startswith("4@")
        assert claims.worker.endswith(f":{os.getpid()}")
        os.kill(process, signal.SIGKILL)
        until(lambda: viewer.owners() == expected, 5)

        def refuse(*_: object) -> None:
            raise PermissionError

        with monkeypatch.context() as patch:  # somebody who may read and not write
            patch.setattr(os, "utime", refuse)
            assert viewer.owners() == expected
    assert viewer.owners() == {"far": "7@far:1"}


def test_claims_are_given_back_when_work_ends_with_an_error(tmp_path: Path) -> None:
    def fail(claims: Claims) -> None:
        with claims:
            assert len(claims.take(["fox", "owl"], 2, anything)) == 2
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail(claims_of(tmp_path))
    assert files(tmp_path) == []
