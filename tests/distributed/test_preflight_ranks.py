"""Real processes that do not agree: all say the same line within seconds, and nothing is left."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from conftest import ROOT, clean_environment, small_config, write_config
from test_world import free_port

HOST = socket.gethostname()


@dataclass
class Rank:
    """One process of a run, started by hand so that it can differ from the others."""

    words: list[str | Path]
    folder: Path = ROOT
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Told:
    """How it ended."""

    code: int
    out: str
    errors: str


def start_together(*ranks: Rank, timeout: float = 120) -> list[Told]:
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(len(ranks))}
    running = []
    try:
        for number, rank in enumerate(ranks):
            place = {**world, "RANK": str(number), "LOCAL_RANK": str(number)}
            running.append(
                subprocess.Popen(
                    [sys.executable, *map(str, rank.words)],
                    cwd=rank.folder,
                    env=clean_environment(**place, **rank.environment),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        said = [process.communicate(timeout=timeout) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [Told(p.returncode, *texts) for p, texts in zip(running, said, strict=True)]


def train(config: Path, *overrides: str) -> list[str | Path]:
    return ["-m", "disttrain", "train", config, *overrides]


def refusal(told: list[Told]) -> str:
    """The line that all ranks ended with."""
    assert [one.code for one in told] == [2] * len(told), told
    lines = [one.errors.strip().splitlines()[-1].partition("disttrain: ")[2] for one in told]
    assert len(set(lines)) == 1, lines
    assert lines[0].startswith("preflight: ")
    return lines[0]


def other_version(folder: Path, package: str, version: str) -> Path:
    """A folder that, first on the path, makes a package seem to have another version."""
    place = folder / f"{package}-{version}.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    return folder


def test_three_that_differ_are_told_apart_on_every_rank(tmp_path: Path) -> None:
    tree = small_config("lora", Path("out"))  # each from where it stands
    config = write_config(tree, tmp_path / "config.yaml")
    first, third = tmp_path / "first", tmp_path / "third"
    first.mkdir()
    shutil.copytree(ROOT / "disttrain", third / "disttrain")
    with (third / "disttrain/errors.py").open("a") as handle:
        handle.write("# another revision\n")
    versions = other_version(tmp_path / "path", "diffusers", "9.9.9")
    usual = {"PYTHONPATH": str(ROOT)}
    told = start_together(
        Rank(train(config), first, usual),
        Rank(train(config, "optim.learning_rate=0.5"), first, usual),
        Rank(train(config), third, {"PYTHONPATH": f"{versions}{os.pathsep}{ROOT}"}),
    )
    line = refusal(told)
    assert f"{HOST} (rank 1) has other settings than rank 0: optim.learning_rate 0.5" in line
    assert "(rank 0: 0.001); start every process with the same config" in line
    assert f"{HOST} (rank 2) has other versions than rank 0: diffusers 9.9.9 (rank 0: " in line
    assert f"{HOST} (rank 2) runs other code of disttrain than rank 0" in line
    assert f"{HOST} (rank 2) does not see what rank 0 writes into output_dir {third}/out" in line
    assert list(first.iterdir()) == []
    assert [path.name for path in third.iterdir()] == ["disttrain"]


def test_another_command_is_told_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    config = write_config(small_config("lora", tmp_path / "out"), tmp_path / "config.yaml")
    started = time.monotonic()
    told = start_together(Rank(train(config)), Rank(train(config, "--fresh")))
    assert time.monotonic() - started < 60
    line = refusal(told)
    assert f"{HOST} (rank 1) has other settings than rank 0: command train --fresh" in line
    assert "(rank 0: train)" in line
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_those_that_agree_train_and_each_has_its_log(tmp_path: Path) -> None:
    tree = small_config("lora", tmp_path / "out", max_steps=1, checkpoint_every=1)
    tree["data"]["batch_size"] = 2
    config = write_config(tree, tmp_path / "config.yaml")
    versions = other_version(tmp_path / "path", "pillow", "9.9.9")
    told = start_together(
        Rank(train(config)), Rank(train(config), environment={"PYTHONPATH": str(versions)})
    )
    assert [one.code for one in told] == [0, 0], told
    assert f"warning: {HOST} (rank 1) has other versions than rank 0: pillow 9.9.9" in told[0].out
    assert told[1].out == ""
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".cache", "lora"]
    logs = {path.name: path.read_text() for path in (tmp_path / "out/lora/logs").iterdir()}
    assert logs.keys() == {f"rank-{rank}-{HOST}.log" for rank in range(2)}
    for rank in range(2):
        text = logs[f"rank-{rank}-{HOST}.log"]
        assert text.startswith("=== ")
        assert f"rank {rank} of 2 on {HOST}, process " in text
        assert text.count("\nrun folder ") == 1
    assert "\nlora fox 1/1" in logs[f"rank-0-{HOST}.log"]


def test_doctor_prints_what_preflight_sees_and_exits_2_where_something_is_wrong(
    tmp_path: Path,
) -> None:
    (tmp_path / "other").mkdir()
    folders = [tmp_path / "runs", tmp_path / "other/runs"]
    told = start_together(
        *(Rank(["-m", "disttrain", "doctor", "--distributed", folder]) for folder in folders)
    )
    assert [one.code for one in told] == [2, 2], told
    assert told[1].out == ""
    shown = told[0].out
    assert f"rank 1       {HOST}, local rank 1, cpu" in shown
    assert "64 MB in " in shown
    assert f"wrong: {HOST} (rank 1) does not see what rank 0 writes" in shown
    assert "output_dir" in shown
    assert "2 to mend" in shown
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["other"]
