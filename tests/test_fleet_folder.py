"""What a fleet's folder says of its subjects, whoever writes it and however it was damaged."""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import small_config

from disttrain.config import RunConfig
from disttrain.config_file import parse_config
from disttrain.engine.fleet_folder import (
    COLUMNS,
    FAILED,
    FINISHED,
    TRAINING,
    WAITING,
    FleetFolder,
    Status,
)
from disttrain.engine.settings_keys import settings_key
from disttrain.errors import DataError
from disttrain.files import write_json

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["disttrain.engine.fleet_folder"])


@pytest.fixture
def member(tmp_path: Path) -> RunConfig:
    return parse_config(small_config("lora", tmp_path))


def rows_of(folder: FleetFolder) -> list[dict[str, Any]]:
    """The table by its JSON lines, once the CSV says the same."""
    lines = (folder.path / "fleet.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=lambda _: pytest.fail("not JSON")) for line in lines]
    with (folder.path / "fleet.csv").open(newline="") as handle:
        found = list(csv.DictReader(handle))
    assert found == [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows]
    return rows


def test_a_status_comes_back_as_it_was_written(tmp_path: Path) -> None:
    folder = FleetFolder(tmp_path)
    assert folder.read("fox") == Status("fox")
    status = Status("fox", FAILED, 3, 9, 0.25, 1.5, "0@host:1", 'a, "b"\nc', "digest")
    folder.write(status)
    assert folder.read("fox") == status
    folder.write(Status("owl", TRAINING))
    folder.write_table(["fox", "owl", "elk"])
    fox, owl, elk = rows_of(folder)
    assert tuple(fox) == COLUMNS
    assert fox == {
        "name": "fox",
        "status": FAILED,
        "steps": 3,
        "max_steps": 9,
        "loss": 0.25,
        "seconds": 1.5,
        "worker": "0@host:1",
        "reason": 'a, "b"\nc',
    }
    assert [owl["status"], elk["status"]] == [TRAINING, WAITING]
    assert b"\r" not in (tmp_path / "fleet.csv").read_bytes(), "line tools read it too"


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_none_in_the_table(loss: float, tmp_path: Path) -> None:
    folder = FleetFolder(tmp_path)
    folder.write(Status("fox", FAILED, loss=loss))
    assert folder.read("fox").loss is None
    folder.write_table(["fox"])
    assert [row["loss"] for row in rows_of(folder)] == [None]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '"finished"',
        '{"status": "finished", "steps": "many"}',
        '{"status": [5]}',
        '{"status": "finished", "steps": 6, "colour": "red"}',
        '{"status": "finished", "steps": null}',
        "\udcff",
    ],
)
def test_a_damaged_status_is_no_status(text: str, member: RunConfig, tmp_path: Path) -> None:
    folder = FleetFolder(tmp_path)
    path = folder.run.subject("fox") / "status.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert folder.read("fox") == Status("fox")
    assert folder.needs_training(member, retry=False)
    folder.write_table(["fox"])
    assert [row["status"] for row in rows_of(folder)] == [WAITING]


def test_a_copied_folder_is_the_subject_that_its_name_says(tmp_path: Path) -> None:
    folder = FleetFolder(tmp_path)
    write_json(folder.run.subject("owl") / "status.json", {"name": "fox", "status": FINISHED})
    assert folder.read("owl").name == "owl"


def test_what_needs_training(member: RunConfig, tmp_path: Path) -> None:
    folder = FleetFolder(tmp_path)
    (subject,) = member.subjects
    key, steps = settings_key(member), member.train.max_steps
    usual = Status(subject.name, steps=steps, max_steps=steps, settings=key)

    def needs(status: str, retry: bool = False, **changed: Any) -> bool:
        folder.write(replace(usual, status=status, **changed))
        return folder.needs_training(member, retry)

    assert folder.needs_training(member, retry=False), "nobody has begun it"
    assert needs(WAITING)
    assert needs(TRAINING)
    assert needs(TRAINING, steps=0)
    assert not needs(FINISHED)
    assert not needs(FINISHED, retry=True)
    assert not needs(FINISHED, steps=steps + 1)
    assert needs(FINISHED, steps=steps - 1), "the manifest now asks for more"
    assert not needs(FAILED)
    assert needs(FAILED, retry=True)
    assert not needs(FAILED, steps=0)
    assert needs(FAILED, settings="of other settings"), "what it failed of may be mended"


def test_settings_that_change_the_result_make_a_failed_subject_another(tmp_path: Path) -> None:
    tree = small_config("lora", tmp_path)
    key = settings_key(parse_config(tree))

    def changed(section: str, name: str, value: Any) -> bool:
        return settings_key(parse_config({**tree, section: {**tree[section], name: value}})) != key

    assert changed("optim", "learning_rate", 0.5)
    assert changed("train", "max_steps", 99)
    assert changed("method", "rank", 2)
    assert not changed("train", "checkpoint_every", 1)
    assert not changed("data", "num_workers", 1)
    subject = {**tree["subjects"][0], "images": "examples/subjects/penguin"}
    assert settings_key(parse_config({**tree, "subjects": [subject]})) != key


def write_tables(path: Path, names: list[str], worker: int, times: int) -> None:
    folder = FleetFolder(path)
    for number in range(times):
        folder.write(Status(names[worker], TRAINING, steps=number, max_steps=times))
        folder.write_table(names)


def test_tables_of_many_writers_are_always_whole(tmp_path: Path) -> None:
    names = [f"s{number:02}" for number in range(40)]
    folder = FleetFolder(tmp_path)
    folder.write_table(names)
    writers = [
        PROCESSES.Process(target=write_tables, args=(tmp_path, names, worker, 40))
        for worker in range(3)
    ]
    for writer in writers:
        writer.start()
    looks, seen = 0, [0, 0, 0]
    while any(writer.is_alive() for writer in writers):
        lines = (tmp_path / "fleet.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert [row["name"] for row in rows] == names
        steps = [row["steps"] for row in rows[:3]]
        assert all(new >= old for new, old in zip(steps, seen, strict=True)), "a table went back"
        with (tmp_path / "fleet.csv").open(newline="") as handle:
            assert [row["name"] for row in csv.DictReader(handle)] == names
        looks, seen = looks + 1, steps
    assert looks > 5
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert [row["steps"] for row in rows_of(folder)[:3]] == [39, 39, 39], "the last one has all"
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


def test_a_worker_that_began_with_an_earlier_manifest_keeps_rows_that_were_added(
    tmp_path: Path,
) -> None:
    folder = FleetFolder(tmp_path)
    folder.remember(["fox", "owl"])
    folder.write(Status("owl", FINISHED))
    folder.remember(["elk", "fox"])  # one row is new, and one that was begun is gone
    assert folder.names() == ["elk", "fox", "owl"]
    folder.write_table(["fox", "owl"])
    assert [row["name"] for row in rows_of(folder)] == ["elk", "fox", "owl"]
    folder.remember(["fox"])
    assert folder.names() == ["fox", "owl"], "a row that nobody began leaves no trace"
    folder.write_table(["fox", "late"])
    assert [row["name"] for row in rows_of(folder)] == ["fox", "owl", "late"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"names": "fox"}', '{"names": [["fox"]]}'])
def test_what_is_no_fleet(text: str, tmp_path: Path) -> None:
    folder = FleetFolder(tmp_path)
    with pytest.raises(DataError, match=r"manifest\.json"):
        folder.names()
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError):
        folder.names()
    folder.write_table(["fox"])
    assert [row["name"] for row in rows_of(folder)] == ["fox"]
    folder.remember(["fox"])
    assert folder.names() == ["fox"]
