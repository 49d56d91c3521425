"""Real processes killed and stopped between checkpoints: the end is bit for bit the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import (
    METHODS,
    ROOT,
    checkpoints,
    clean_environment,
    disttrain,
    small_config,
    write_config,
)
from early_stop import early_config

from disttrain.files import sha256_file

STEPS = 40


def start(config: Path) -> subprocess.Popen[str]:
    """A training process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "disttrain", "train", str(config)],
        cwd=ROOT,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def signal_at_step(process: subprocess.Popen[str], run: Path, step: int, number: int) -> None:
    """Send a signal once the run has logged `step`."""
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.is_file() or metrics.read_text().count("\n") < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, number)


def digests(run: Path) -> dict[str, str]:
    """What must be equal: the last checkpoint's tensors, and the results."""
    newest = checkpoints(run)[-1]
    assert newest.name == f"step-{STEPS:08d}"
    paths = [newest / "trainables.safetensors", newest / "optimizer.safetensors"]
    paths += sorted((run / "subjects").rglob("*.safetensors"))
    return {str(path.relative_to(run)): sha256_file(path) for path in paths}


def long_config(method: str, folder: Path) -> Path:
    tree = small_config(method, folder, max_steps=STEPS, checkpoint_every=8)
    tree["data"]["batch_size"] = 2
    return write_config(tree, folder / "config.yaml")


@pytest.mark.parametrize("method", METHODS)
def test_sigkill_between_checkpoints_changes_nothing(method: str, tmp_path: Path) -> None:
    whole = disttrain("train", long_config(method, tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    config = long_config(method, tmp_path / "killed")
    run = tmp_path / "killed" / method
    process = start(config)
    signal_at_step(process, run, 13, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    newest = checkpoints(run)[-1].name
    assert newest != f"step-{STEPS:08d}", "the kill came too late to prove anything"
    (run / "subjects/fox/.model.planted.tmp").mkdir(parents=True)
    resumed = disttrain("train", config)
    assert resumed.returncode == 0, resumed.stderr
    assert f"going on from step {int(newest.split('-')[1])}" in resumed.stdout
    assert digests(run) == digests(tmp_path / "whole" / method)
    steps = [json.loads(row)["step"] for row in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))
    assert not list(tmp_path.rglob(".*.tmp"))


def test_sigkill_does_not_change_which_state_is_the_result(tmp_path: Path) -> None:
    """Scored for real; where it ends is up to the scores."""

    def config(folder: Path) -> Path:
        tree = early_config("lora", folder, max_steps=STEPS, checkpoint_every=5)
        return write_config(tree, folder / "config.yaml")

    whole = disttrain("train", config(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    run = tmp_path / "killed/lora"
    process = start(config(tmp_path / "killed"))
    signal_at_step(process, run, 8, signal.SIGKILL)
    process.communicate()
    assert not (run / "progress.json").exists(), "the kill came too late to prove anything"
    resumed = disttrain("train", tmp_path / "killed/config.yaml")
    assert resumed.returncode == 0, resumed.stderr
    assert "going on from step" in resumed.stdout
    other = tmp_path / "whole/lora"
    wanted = [other / "progress.json", *(other / "subjects").rglob("*.safetensors")]
    for path in [*wanted, *(other / "subjects").rglob("state.json")]:
        assert sha256_file(run / path.relative_to(other)) == sha256_file(path), path


def data_config(folder: Path) -> Path:
    """Pictures decoded by two processes, in buckets, with an average: all that data can do."""
    tree = small_config("lora", folder, max_steps=STEPS, checkpoint_every=8)
    tree["method"] = {"name": "finetune"}
    tree["data"] |= {
        "batch_size": 2,
        "cache_latents": False,
        "num_workers": 2,
        "aspect_ratio_buckets": True,
        "bucket_step": 16,
    }
    tree["captions"] = {"dropout": 0.2}
    tree["optim"]["ema_decay"] = 0.9
    return write_config(tree, folder / "config.yaml")


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_run_with_workers_ends_as_if_it_had_not_stopped(tmp_path: Path, number: int) -> None:
    whole = disttrain("train", data_config(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    config = data_config(tmp_path / "stopped")
    run = tmp_path / "stopped/lora"
    process = start(config)
    signal_at_step(process, run, 13, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (75 if number == signal.SIGTERM else -number), errors
    # Workers whose parent was killed may say that the connection to it was lost.
    assert number == signal.SIGKILL or "Traceback" not in errors
    assert checkpoints(run)[-1].name != f"step-{STEPS:08d}"
    assert disttrain("train", config).returncode == 0
    end, expected = digests(run), digests(tmp_path / "whole/lora")
    assert {name: end[name] for name in expected} == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_and_the_run_goes_on(tmp_path: Path, number: int) -> None:
    whole = disttrain("train", long_config("textual_inversion", tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    config = long_config("textual_inversion", tmp_path / "stopped")
    run = tmp_path / "stopped/textual_inversion"
    process = start(config)
    signal_at_step(process, run, 11, number)
    _, errors = process.communicate()
    assert process.returncode == 75, errors
    assert "stopped at step" in errors
    assert "Traceback" not in errors
    newest = int(checkpoints(run)[-1].name.split("-")[1])
    assert 11 <= newest < STEPS
    assert disttrain("train", config).returncode == 0
    assert digests(run).keys() >= digests(tmp_path / "whole/textual_inversion").keys()
    final = digests(run)
    for name, digest in digests(tmp_path / "whole/textual_inversion").items():
        assert final[name] == digest


def test_a_second_process_on_the_same_run_is_refused(tmp_path: Path) -> None:
    config = long_config("lora", tmp_path)
    process = start(config)
    try:
        signal_at_step(process, tmp_path / "lora", 1, 0)
        os.kill(process.pid, signal.SIGSTOP)
        second = disttrain("train", config)
        assert second.returncode == 2
        assert f"in use by process {process.pid}" in second.stderr
    finally:
        process.kill()
        process.communicate()
