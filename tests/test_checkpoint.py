"""Checkpoints survive kills at every file event, damage, and are pruned only when that is safe."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from disttrain.engine import checkpoint as module
from disttrain.engine.checkpoint import (
    AVERAGE,
    PARTS,
    Checkpoint,
    checkpoint_path,
    list_checkpoints,
    newest_checkpoint,
    optimizer_tensors,
    read_checkpoint,
    read_when_visible,
    restore_optimizer,
    restore_parameters,
    write_checkpoint,
)
from disttrain.engine.optim import PackedAdamW
from disttrain.errors import CheckpointError
from disttrain.files import remove_temporaries, sha256_file, write_json, write_tensors

Writer = Callable[[Path, int, Checkpoint, int], object]


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that the system holds; only speed needs this."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def checkpoint_of(step: int) -> Checkpoint:
    trainables = {"a.down": torch.full((2, 3), float(step)), "tokens": torch.arange(4.0) + step}
    optimizer = {"a.down|exp_avg": torch.full((2, 3), step / 7), "a.down|step": torch.tensor(step)}
    state = {"step": step, "cursor": 4 * step, "subjects": ["fox"], "sources": {"fox": "ab"}}
    return Checkpoint(state, trainables, optimizer, {"a.down": torch.full((2, 3), step / 3)})


def equal(found: Checkpoint, expected: Checkpoint) -> bool:
    def tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
        return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)

    return (
        expected.state.items() <= found.state.items()
        and tensors(found.trainables, expected.trainables)
        and tensors(found.optimizer, expected.optimizer)
        and tensors(found.average, expected.average)
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_comes_back_as_written(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 500, checkpoint_of(500), keep=2)
    assert path == tmp_path / "step-00000500"
    assert names(path) == sorted([*PARTS, AVERAGE, "state.json"])
    assert equal(read_checkpoint(path), checkpoint_of(500))
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found[0] == path
    assert equal(found[1], checkpoint_of(500))
    assert found[2] == []


def test_without_an_average_there_is_no_file_of_it(tmp_path: Path) -> None:
    checkpoint = replace(checkpoint_of(5), average={})
    path = write_checkpoint(tmp_path, 5, checkpoint, keep=2)
    assert names(path) == sorted([*PARTS, "state.json"])
    assert equal(read_checkpoint(path), checkpoint)


def test_no_checkpoints_is_nothing(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "absent") is None
    for name in (".step-00000001.x.tmp", "step-1", "step-00000001.bak", "notes"):
        (tmp_path / name).mkdir()
    assert newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_pruning_keeps_the_newest(tmp_path: Path, keep: int) -> None:
    steps = [9, 10, 99, 100, 1000]
    for step in steps:
        write_checkpoint(tmp_path, step, checkpoint_of(step), keep)
    assert names(tmp_path) == [f"step-{step:08d}" for step in steps[-keep:]]


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES = [damage_flip, damage_cut, damage_empty, Path.unlink]


@pytest.mark.parametrize("part", [*PARTS, AVERAGE, "state.json"])
@pytest.mark.parametrize("damage", DAMAGES, ids=["flip", "cut", "empty", "missing"])
def test_damaged_newest_is_passed_over_with_a_line(
    tmp_path: Path, part: str, damage: Callable[[Path], None]
) -> None:
    for step in (1, 2):
        path = write_checkpoint(tmp_path, step, checkpoint_of(step), keep=2)
    damage(path / part)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found[0] == checkpoint_path(tmp_path, 1)
    assert equal(found[1], checkpoint_of(1))
    (line,) = found[2]
    assert line.startswith(str(path))
    assert "\n" not in line


@pytest.mark.parametrize(
    "change", [{"cursor": 9}, {"step": 1}, {"digests": []}, {"digest": "0"}, {"format": 1}]
)
def test_a_state_that_someone_changed_is_damage(tmp_path: Path, change: dict[str, Any]) -> None:
    path = write_checkpoint(tmp_path, 2, checkpoint_of(2), keep=2) / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError):
        read_checkpoint(path.parent)


def test_a_state_that_is_no_mapping_is_damage(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 2, checkpoint_of(2), keep=2)
    (path / "state.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="not a checkpoint of this version"):
        read_checkpoint(path)


def test_all_damaged_is_an_error_that_names_each(tmp_path: Path) -> None:
    paths = [write_checkpoint(tmp_path, step, checkpoint_of(step), keep=2) for step in (1, 2)]
    for path in paths:
        damage_flip(path / PARTS[0])
    with pytest.raises(CheckpointError, match=r"no usable checkpoint: .*use --fresh") as caught:
        newest_checkpoint(tmp_path)
    assert all(str(path) in str(caught.value) for path in paths)
    assert "\n" not in str(caught.value)


def test_a_damaged_newer_one_is_not_kept_instead_of_what_was_just_written(tmp_path: Path) -> None:
    """A run that went on from step 1 past a damaged 9 stops at step 5."""
    write_checkpoint(tmp_path, 1, checkpoint_of(1), keep=1)
    damage_flip(write_checkpoint(tmp_path, 9, checkpoint_of(9), keep=2) / PARTS[1])
    write_checkpoint(tmp_path, 5, checkpoint_of(5), keep=1)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert equal(found[1], checkpoint_of(5))
    assert names(tmp_path) == ["step-00000005", "step-00000009"]


def test_a_damaged_one_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 5, checkpoint_of(5), keep=1)
    damage_cut(path / PARTS[0])
    write_checkpoint(tmp_path, 5, checkpoint_of(5), keep=1)
    assert equal(read_checkpoint(path), checkpoint_of(5))


def test_another_state_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 5, checkpoint_of(5), keep=1)
    path = write_checkpoint(tmp_path, 5, checkpoint_of(6), keep=1)
    assert equal(read_checkpoint(path), checkpoint_of(6))


# The drill: a process is killed at every event by which a writer touches a file.

FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate")


def write_and_die(write: Callable[[], object], folder: Path, when: int) -> int:
    """Run `write` in a forked child that kills itself just before file event `when` (from 1).

    Returns the number of events seen if there were fewer, else 0. Events are Python's own audit
    events on paths below `folder`, so the drill knows nothing of how a writer goes about it.
    """
    child = os.fork()
    if child == 0:
        try:
            seen = 0

            def count(event: str, arguments: tuple[Any, ...]) -> None:
                nonlocal seen
                if event in FILE_EVENTS and str(folder) in str(arguments[:2]):
                    seen += 1
                    if seen == when:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(count)
            write()
            os._exit(min(seen, 200))
        finally:
            os._exit(255)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return 0
    assert os.WEXITSTATUS(status) not in (0, 255), "the writer failed or touched no file"
    return os.WEXITSTATUS(status)


def whole(path: Path) -> bool:
    try:
        return bool(read_checkpoint(path))
    except CheckpointError:
        return False


def drill(writer: Writer, folder: Path, before: list[int], step: int, keep: int) -> list[str]:
    """Kill `writer` at each of its events; a line for each place that left something unsound."""
    problems = []
    start = folder / "start"
    start.mkdir()
    for old in before:
        write_checkpoint(start, old, checkpoint_of(old), keep)
    for when in range(1, 200):
        place = shutil.copytree(start, folder / f"{when}")
        write = partial(writer, place, step, checkpoint_of(step), keep)
        wrote = write_and_die(write, place, when)
        remove_temporaries(place)
        allowed = [checkpoint_of(s) for s in (*before[-1:], step)]
        try:
            found = newest_checkpoint(place)
        except CheckpointError as error:
            problems.append(f"{when}: {error}")
        else:
            if found is None:
                if before:
                    problems.append(f"{when}: nothing left")
            elif found[2] or not all(map(whole, list_checkpoints(place))):
                problems.append(f"{when}: half written or half removed")
            elif not any(equal(found[1], expected) for expected in allowed):
                problems.append(f"{when}: neither the old nor the new")
        write_checkpoint(place, step + 1, checkpoint_of(step + 1), keep)
        if len(names(place)) > keep:
            problems.append(f"{when}: {names(place)} left after the next checkpoint")
        if wrote:
            assert when == wrote + 1 > 3, "every event was a place to die"
            return problems
    raise AssertionError("the drill came to no end")


SCENES = {
    "first": ([], 10, 2),
    "second": ([10], 20, 2),
    "pruning": ([10, 20], 30, 2),
    "pruning to one": ([10], 20, 1),
    "same step again": ([10], 10, 1),
}


@pytest.mark.parametrize("scene", ["first", "pruning", "pruning to one", "same step again"])
def test_killed_at_any_file_event_there_is_a_whole_checkpoint(tmp_path: Path, scene: str) -> None:
    assert drill(write_checkpoint, tmp_path, *SCENES[scene]) == []


def in_place(folder: Path, step: int, checkpoint: Checkpoint, keep: int) -> None:
    """The naive writer: final names from the start, no rename; otherwise the same files."""
    path = checkpoint_path(folder, step)
    path.mkdir(parents=True, exist_ok=True)
    write_tensors(path / PARTS[0], checkpoint.trainables)
    write_tensors(path / PARTS[1], checkpoint.optimizer)
    write_tensors(path / AVERAGE, checkpoint.average)
    digests = {name: sha256_file(path / name) for name in (*PARTS, AVERAGE)}
    state = {"format": module.FORMAT, **checkpoint.state, "digests": digests}
    write_json(path / "state.json", {**state, "digest": module.digest_of(state)})
    for old in list_checkpoints(folder)[:-keep]:
        module.remove_folder(old)


def pruning_first(folder: Path, step: int, checkpoint: Checkpoint, keep: int) -> None:
    """The other classic: make room before the new one is in place."""
    for old in list_checkpoints(folder)[: len(list_checkpoints(folder)) - keep + 1]:
        module.remove_folder(old)
    write_checkpoint(folder, step, checkpoint, keep)


@pytest.mark.parametrize(
    ("writer", "scene", "fragment"),
    [
        (in_place, "first", "no usable checkpoint"),
        (in_place, "second", "half written or half removed"),
        (pruning_first, "pruning to one", "nothing left"),
    ],
)
def test_the_drill_finds_naive_writers(
    tmp_path: Path, writer: Writer, scene: str, fragment: str
) -> None:
    problems = drill(writer, tmp_path, *SCENES[scene])
    assert any(fragment in problem for problem in problems), problems


# Optimizer and parameter state.


def trained(kind: str) -> tuple[dict[str, torch.Tensor], torch.optim.Optimizer]:
    parameters = {
        name: nn.Parameter(torch.full((2, 3), float(i)))
        for i, name in enumerate(("x.down", "x.up"))
    }
    values = list(parameters.values())
    if kind == "packed":
        optimizer = PackedAdamW([{"params": values, "lr": 0.1}], (0.9, 0.99), 1e-8, 0.01)
    else:
        optimizer = torch.optim.AdamW(values, 0.1)
    return dict(parameters), optimizer


def take_step(parameters: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    for parameter in parameters.values():
        parameter.grad = parameter.detach().cos()
    optimizer.step()


@pytest.mark.parametrize("kind", ["packed", "torch"])
def test_a_restored_optimizer_goes_on_to_the_bit(tmp_path: Path, kind: str) -> None:
    parameters, optimizer = trained(kind)
    take_step(parameters, optimizer)
    names_of = {value: name for name, value in parameters.items()}
    saved = Checkpoint(
        {}, {k: v.detach() for k, v in parameters.items()}, optimizer_tensors(optimizer, names_of)
    )
    assert {"x.down|exp_avg", "x.up|exp_avg_sq", "x.up|step"} <= saved.optimizer.keys()
    path = write_checkpoint(tmp_path, 1, saved, keep=1)
    take_step(parameters, optimizer)

    again, fresh = trained(kind)
    found = read_checkpoint(path)
    restore_parameters(again, found.trainables, str(path))
    restore_optimizer(fresh, {value: name for name, value in again.items()}, found.optimizer)
    take_step(again, fresh)
    for name, value in parameters.items():
        assert torch.equal(again[name], value)


@pytest.mark.parametrize(
    ("saved", "problem"),
    [
        ({"x.down": torch.zeros(2, 3)}, "holds other tensors"),
        ({"x.down": torch.zeros(2, 3), "x.other": torch.zeros(2, 3)}, "holds other tensors"),
        ({"x.down": torch.zeros(2, 3), "x.up": torch.zeros(2, 4)}, "x.up has another shape"),
    ],
)
def test_tensors_of_another_run_are_refused(saved: dict[str, torch.Tensor], problem: str) -> None:
    parameters, _ = trained("packed")
    with pytest.raises(CheckpointError, match=rf"^PATH: .*{problem}.*use --fresh|^PATH: {problem}"):
        restore_parameters(parameters, saved, "PATH")


def test_a_checkpoint_that_is_not_visible_yet_is_waited_for(tmp_path: Path) -> None:
    hidden = write_checkpoint(tmp_path / "elsewhere", 3, checkpoint_of(3), 2)
    path = checkpoint_path(tmp_path / "seen", 3)
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="incomplete"):
        read_when_visible(path, seconds=0.2)
    assert time.monotonic() - began >= 0.2
    appears = threading.Timer(0.7, shutil.copytree, [hidden, path])
    appears.start()
    found = read_when_visible(path, seconds=30)
    appears.join()
    assert equal(found, read_checkpoint(hidden))
