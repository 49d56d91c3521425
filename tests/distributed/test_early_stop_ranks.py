"""Subjects that end early in several real processes: where, and with the result, of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import checkpoints, train_here
from early_stop import early_config, plant
from rank_probe import fall_after_four
from test_placement_ranks import probe, run

from disttrain.engine.checkpoint import read_checkpoint
from disttrain.engine.ending import End
from disttrain.engine.run_folder import RunFolder
from disttrain.files import read_tensors

WAYS = {
    "ddp": ("lora", {}),
    "fsdp": ("dreambooth", {"strategy": "fsdp"}),
    "zero2": ("dreambooth", {"strategy": "zero2"}),
    "zero3": ("dreambooth", {"strategy": "zero3"}),
}
QUICK = {"ddp", "fsdp"}


def on_two(tree: dict[str, Any], output: Path) -> dict[str, Any]:
    """The same pictures a step, half of them on each of two processes."""
    return {**tree, "output_dir": str(output), "data": {**tree["data"], "batch_size": 1}}


def readings(folder: Path) -> list[dict[str, Any]]:
    return read_checkpoint(checkpoints(folder)[-1]).state["scored"]["readings"]


@pytest.mark.parametrize(
    "way", [pytest.param(w, marks=() if w in QUICK else pytest.mark.slow) for w in WAYS]
)
def test_all_ranks_end_a_subject_alike(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank zero alone has scores; all stop, and all put the best state back."""
    method, parallel = WAYS[way]
    tree = early_config(method, tmp_path / "one")
    with monkeypatch.context() as patch:
        plant(patch, {"fox": {step: fall_after_four(step) for step in range(2, 13, 2)}})
        one = train_here(tree)
    split = {**on_two(tree, tmp_path / "two"), "parallel": parallel}
    said = probe("planted", split, tmp_path / "c.yaml")
    two = tmp_path / "two" / method
    assert "over-trained at the last 2 scorings, ends at step 8; its result is step 4" in said
    assert RunFolder(two).finished() == RunFolder(one).finished() == {"fox": End(8, 4, 2)}
    assert readings(two) == readings(one)
    assert len((two / "metrics.jsonl").read_text().splitlines()) == 8
    if method == "lora":
        names = ("fox.safetensors", "steps/fox-00000004.safetensors")
        result, copy = (two / "subjects/fox" / name for name in names)
        assert result.read_bytes() == copy.read_bytes()
        return
    model = read_tensors(two / "subjects/fox/model/unet/diffusion_pytorch_model.safetensors")
    best, last = (
        read_tensors(two / f"subjects/fox/checkpoints/step-{step:08d}/trainables.safetensors")
        for step in (4, 8)
    )
    assert all(torch.equal(value, best[f"unet.{name}"]) for name, value in model.items())
    assert not all(torch.equal(value, last[f"unet.{name}"]) for name, value in model.items())


def test_two_processes_give_the_scores_of_one(tmp_path: Path) -> None:
    tree = early_config("lora", tmp_path / "one", max_steps=4, early_stop_patience=9)
    one = train_here(tree)
    two = run(on_two(tree, tmp_path / "two"), tmp_path / "c.yaml", 2)
    for ours, theirs in zip(readings(two), readings(one), strict=True):
        assert ours["step"] == theirs["step"]
        for name in ("subject", "subject_error", "diversity", "drift"):
            assert ours["scores"][name] == pytest.approx(theirs["scores"][name], abs=3e-3)
