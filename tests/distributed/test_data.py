"""The data plane in real worlds: one global sequence, and runs that go on with other worlds."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, checkpoints, run_command, small_config, train_here, write_config
from distributed.test_world import free_port
from pictures import uneven_shards

from disttrain.files import read_tensors

pytestmark = pytest.mark.slow  # test_loader.py has the same without real worlds
TORCHRUN = [Path(sys.executable).parent / "torchrun"]
PICTURES = 130


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("shards")
    return [uneven_shards(folder, PICTURES, number) for number in (1, 7, 100)]


@pytest.fixture(scope="module")
def sequences(
    indexes: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, dict[str, list[list[int]]]]:
    """What worlds of 1 to 5 processes read."""
    folder = tmp_path_factory.mktemp("seen")
    found = {}
    for world in range(1, 6):
        result = folder / f"{world}.json"
        command = [*TORCHRUN, "--nproc-per-node", str(world), "--master-port", free_port()]
        probe = ROOT / "tests/distributed/order_probe.py"
        done = run_command(*command, probe, result, *indexes, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        found[world] = json.loads(result.read_text())
    return found


def test_every_world_reads_one_sequence(
    sequences: dict[int, dict[str, list[list[int]]]],
) -> None:
    for name, steps in sequences[1].items():
        flat = [picture for step in steps for picture in step]
        assert sorted(flat[:PICTURES]) == list(range(PICTURES)), name
        assert sorted(flat[PICTURES : 2 * PICTURES]) == list(range(PICTURES)), name
        assert flat[:PICTURES] != flat[PICTURES : 2 * PICTURES]
        for world in range(2, 6):
            assert sequences[world][name] == steps, f"{name}, {world} processes"


def launch(world: int, config: Path, *overrides: str) -> tuple[int, str]:
    command = [*TORCHRUN, "--nproc-per-node", str(world), "--master-port", free_port(), "-m"]
    done = run_command(*command, "disttrain", "train", config, *overrides, timeout=300)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def elastic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A config of 12 pictures a step, and the run of two steps that 4 processes began."""
    folder = tmp_path_factory.mktemp("elastic")
    tree = small_config("lora", folder / "four", max_steps=4, checkpoint_every=2)
    tree["data"] |= {"batch_size": 3}
    config = write_config(tree, folder / "config.yaml")
    code, said = launch(4, config, "train.max_steps=2")
    assert code == 0, said[-3000:]
    return config, folder / "four"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same four steps of 12 pictures on one process."""
    tree = small_config("lora", tmp_path_factory.mktemp("one"), max_steps=4)
    tree["data"] |= {"batch_size": 12}
    return train_here(tree)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_run_goes_on_with_another_world(
    elastic: tuple[Path, Path], undisturbed: Path, world: int, tmp_path: Path
) -> None:
    config, begun = elastic
    output = tmp_path / "output"
    shutil.copytree(begun, output)
    code, said = launch(world, config, f"output_dir={output}")
    assert code == 0, said[-3000:]
    assert "going on from step 2" in said
    left, right = (
        read_tensors(checkpoints(run)[-1] / "trainables.safetensors")
        for run in (output / "lora", undisturbed)
    )
    difference = max((left[name] - right[name]).abs().max().item() for name in left)
    assert difference < 1e-4
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (output / "lora", undisturbed)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_world_that_does_not_divide_is_refused(
    elastic: tuple[Path, Path], tmp_path: Path
) -> None:
    config, begun = elastic
    output = tmp_path / "output"
    shutil.copytree(begun, output)
    code, said = launch(5, config, f"output_dir={output}")
    assert code != 0
    assert "12 pictures cannot be split over 5 processes; use 1, 2, 3, 4, 6, 12" in said


def test_textual_inversion_sends_its_own_rows_only(tmp_path: Path) -> None:
    """Two vectors of 64 numbers, where the public script sends the whole vocabulary."""
    tree = small_config("textual_inversion", tmp_path)
    config = write_config(tree, tmp_path / "config.yaml")
    command = [*TORCHRUN, "--nproc-per-node", "2", "--master-port", free_port()]
    probe = ROOT / "tests/distributed/traffic_probe.py"
    done = run_command(*command, probe, config, tmp_path / "seen.json", timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["sent"] == 2 * 64 * 4
    assert seen["state"] == 2 * 2 * 64 * 4 + 8  # two moments and a step count
