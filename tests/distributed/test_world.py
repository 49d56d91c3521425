"""Two real processes over gloo, by each launcher, against one process with twice the batch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import METHODS, ROOT, checkpoints, run_command, small_config, train_here, write_config

from disttrain.files import read_tensors

BIN = Path(sys.executable).parent
ACCELERATE = [BIN / "accelerate", "launch"]
LAUNCHERS: dict[str, tuple[list[str | Path], dict[str, str]]] = {
    "accelerate_cpu_config": (
        [*ACCELERATE, "--config_file", ROOT / "launch/accelerate/cpu.yaml", "-m"],
        {},
    ),
    "accelerate_multi_gpu": (
        [*ACCELERATE, *["--multi_gpu", "--num_machines", "1", "--num_processes", "2"], "-m"],
        {"ACCELERATE_USE_CPU": "true"},
    ),
    "torchrun": ([BIN / "torchrun", "--nproc-per-node", "2", "-m"], {}),
}
QUICK = {
    "textual_inversion": "torchrun",
    "lora": "accelerate_cpu_config",
    "dreambooth": "accelerate_multi_gpu",
}
PAIRS = [
    pytest.param(method, launcher, marks=() if QUICK[method] == launcher else pytest.mark.slow)
    for method in METHODS
    for launcher in LAUNCHERS
]


def free_port() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(launcher: str, *arguments: str | Path) -> tuple[int, str, str]:
    command, extra = LAUNCHERS[launcher]
    port = ["--main_process_port", free_port()] if "accelerate" in launcher else []
    if launcher == "torchrun":
        port = ["--master-port", free_port()]
    placed = [*command[:-1], *port, command[-1]]
    done = run_command(*placed, "disttrain", *arguments, timeout=240, **extra)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A batch of 4 on one process, once per method."""
    output = tmp_path_factory.mktemp("one")
    return {method: train_here(small_config(method, output)) for method in METHODS}


@pytest.mark.parametrize(("method", "launcher"), PAIRS)
def test_two_processes_equal_one(
    method: str, launcher: str, one_process: dict[str, Path], tmp_path: Path
) -> None:
    tree = small_config(method, tmp_path)
    tree["data"]["batch_size"] = 2
    config = write_config(tree, tmp_path / "config.yaml")
    code, _, errors = launch(launcher, "train", config)
    assert code == 0, errors[-3000:]
    two = tmp_path / method
    assert json.loads((two / "environment.json").read_text())["world_size"] == 2
    left, right = (
        read_tensors(checkpoints(run)[-1] / "trainables.safetensors")
        for run in (one_process[method], two)
    )
    assert left.keys() == right.keys()
    difference = max((left[name] - right[name]).abs().max().item() for name in left)
    assert difference < 1e-4
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (one_process[method], two)
    ]
    assert torch.allclose(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4)


def test_learning_rate_counts_processes_and_class_pictures_are_shared_out(tmp_path: Path) -> None:
    tree = small_config("dreambooth", tmp_path, max_steps=1)
    tree["optim"]["scale_lr"] = "linear"
    tree["data"]["batch_size"] = 2
    tree["train"]["gradient_accumulation_steps"] = 2
    tree["method"].update(num_class_images=11, class_infer_steps=2)
    code, out, errors = launch("torchrun", "train", write_config(tree, tmp_path / "c.yaml"))
    assert code == 0, errors[-3000:]
    rate = json.loads((tmp_path / "dreambooth/environment.json").read_text())["learning_rate"]
    assert rate["factor"] == 8
    assert rate["learning_rate"] == pytest.approx(8e-4)
    assert out.count("learning rate 0.0008 = 0.0001 x 2 processes x 2 batch x 2 accumulation") == 1
    drawn = sorted((tmp_path / ".cache/class_images").rglob("*.png"))
    assert [path.name for path in drawn] == [f"{i:05d}.png" for i in range(3)]


def test_a_world_that_is_not_the_launchers_is_refused(tmp_path: Path) -> None:
    """Accelerate's `--cpu` starts one process of two without a word: the trainer says it."""
    config = write_config(small_config("lora", tmp_path), tmp_path / "config.yaml")
    command = [*ACCELERATE, "--cpu", "--num_processes", "2", "-m", "disttrain", "train", config]
    done = run_command(*command)
    assert done.returncode != 0
    assert "asked for several processes and started one" in done.stderr
    assert not (tmp_path / "lora").exists()
