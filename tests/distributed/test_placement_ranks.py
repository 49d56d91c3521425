"""A model split over real processes, by DeepSpeed and by torch: the same run as whole on one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, checkpoints, run_command, small_config, train_here, write_config
from test_world import ACCELERATE, BIN, free_port

from disttrain.files import read_tensors

SPLIT = {
    "zero1": {"strategy": "zero1"},
    "zero2": {"strategy": "zero2"},
    "zero2_offload": {"strategy": "zero2", "offload_optimizer": True},
    "zero3": {"strategy": "zero3"},
    "zero3_offload": {"strategy": "zero3", "offload_optimizer": True},
    "fsdp": {"strategy": "fsdp"},
}
QUICK = {"zero2", "zero3_offload", "fsdp"}
WAYS = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow, id=name) for name in SPLIT
]


def settings(output: Path, parallel: dict[str, Any] | None = None, **other: Any) -> dict[str, Any]:
    """DreamBooth with everything it can train, 12 pictures a step in micro-batches of 2."""
    tree = small_config("dreambooth", output, max_steps=other.pop("max_steps", 5))
    tree["data"].update(batch_size=2, global_batch_size=12)
    tree["parallel"] = parallel or {}
    for key, value in other.items():
        section, _, name = key.partition("__")
        tree.setdefault(section, {})[name] = value
    return tree


def run(tree: dict[str, Any], where: Path, processes: int) -> Path:
    """Train in `processes` real ones; returns the run folder."""
    config = write_config(tree, where)
    command = [BIN / "torchrun", "--nproc-per-node", str(processes), "--master-port", free_port()]
    done = run_command(*command, "-m", "disttrain", "train", config, timeout=280)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    return Path(tree["output_dir"]) / tree["name"]


def probe(what: str, tree: dict[str, Any], where: Path) -> str:
    """What the command says in two processes of `rank_probe.py`."""
    config = write_config(tree, where)
    command = [BIN / "torchrun", "--nproc-per-node", "2", "--master-port", free_port()]
    script = Path(__file__).parent / "rank_probe.py"
    done = run_command(*command, script, what, "train", config, timeout=280, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    return done.stdout


def losses(folder: Path) -> torch.Tensor:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return torch.tensor([json.loads(line)["loss"] for line in lines])


def difference(left: Path, right: Path, part: str) -> float:
    a, b = (
        read_tensors(checkpoints(folder)[-1] / f"{part}.safetensors") for folder in (left, right)
    )
    assert a.keys() == b.keys()
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on one process."""
    return train_here(settings(tmp_path_factory.mktemp("whole")))


@pytest.mark.parametrize("way", WAYS)
def test_a_split_model_takes_the_same_steps(way: str, whole: Path, tmp_path: Path) -> None:
    folder = run(settings(tmp_path, SPLIT[way]), tmp_path / "c.yaml", 2)
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["strategy"] == SPLIT[way]["strategy"]
    assert torch.allclose(losses(folder), losses(whole), rtol=1e-4)
    assert difference(folder, whole, "trainables") < 1e-4
    assert difference(folder, whole, "optimizer") < 1e-3
    from diffusers import StableDiffusionPipeline

    left, right = (
        StableDiffusionPipeline.from_pretrained(one / "subjects/fox/model")
        for one in (folder, whole)
    )
    for part in ("unet", "text_encoder", "vae"):
        ours, theirs = getattr(left, part).state_dict(), getattr(right, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-4


@pytest.mark.slow
def test_a_run_goes_on_under_any_placement_and_world(whole: Path, tmp_path: Path) -> None:
    for steps, processes, parallel in [
        (1, 2, SPLIT["zero3"]),
        (2, 3, SPLIT["fsdp"]),
        (3, 2, SPLIT["zero2"]),
        (4, 1, {}),
        (5, 2, SPLIT["zero3_offload"]),
    ]:
        tree = settings(tmp_path, parallel, max_steps=steps)
        folder = run(tree, tmp_path / f"{steps}.yaml", processes)
    assert torch.allclose(losses(folder), losses(whole), rtol=1e-4)
    assert difference(folder, whole, "trainables") < 1e-4
    assert difference(folder, whole, "optimizer") < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("way", ["zero2", "fsdp"])
def test_bfloat16_learns_as_it_does_whole(way: str, tmp_path: Path) -> None:
    """Weights that compute are rounded; those that the steps add up in are not, so small steps
    are not lost."""
    tree = settings(tmp_path / "whole", SPLIT["zero2"])
    one = train_here(tree | {"mixed_precision": "bf16", "parallel": {}})
    tree = settings(tmp_path / "split", SPLIT[way]) | {"mixed_precision": "bf16"}
    assert torch.allclose(losses(run(tree, tmp_path / "c.yaml", 2)), losses(one), rtol=5e-3)


@pytest.mark.slow
def test_the_average_of_split_weights(tmp_path: Path) -> None:
    average = {"optim__ema_decay": 0.9, "train__sample_prompts": ["a photo of {token}"]}
    average["train__sample_steps"] = 2
    one = train_here(settings(tmp_path / "whole", **average))
    two = run(settings(tmp_path / "split", SPLIT["fsdp"], **average), tmp_path / "c.yaml", 2)
    assert difference(one, two, "average") < 1e-4
    assert difference(one, two, "trainables") > 1e-9
    files = ("unet/diffusion_pytorch_model", "text_encoder/model")
    for file in files:
        left, right = (
            read_tensors(folder / f"subjects/fox/model/{file}.safetensors") for folder in (one, two)
        )
        assert max((left[name] - right[name]).abs().max().item() for name in left) < 1e-4
    assert [p.name for p in (two / "subjects/fox/samples").iterdir()] == ["00000005-0.png"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "textual_inversion"])
def test_a_split_base_under_a_pack(method: str, tmp_path: Path) -> None:
    tree = small_config(method, tmp_path / "whole")
    tree["data"].update(batch_size=2, global_batch_size=4)
    one = train_here(tree)
    tree |= {"output_dir": str(tmp_path / "split")}
    tree["parallel"] = {"strategy": "fsdp", "force": True}
    two = run(tree, tmp_path / "c.yaml", 2)
    assert torch.allclose(losses(two), losses(one), rtol=1e-4)
    assert difference(one, two, "trainables") < 1e-4


@pytest.mark.parametrize("file", [pytest.param("zero3", marks=pytest.mark.slow), "fsdp"])
def test_launch_files_of_accelerate(file: str, whole: Path, tmp_path: Path) -> None:
    config = write_config(settings(tmp_path), tmp_path / "c.yaml")
    command = [*ACCELERATE, "--config_file", ROOT / f"launch/accelerate/{file}.yaml"]
    command += ["--main_process_port", free_port(), "-m", "disttrain", "train", config]
    done = run_command(*command, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "dreambooth"
    assert json.loads((folder / "environment.json").read_text())["strategy"] == file
    assert torch.allclose(losses(folder), losses(whole), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["zero3", "fsdp"])
def test_a_step_that_is_not_finite_changes_nothing(way: str, tmp_path: Path) -> None:
    tree = settings(tmp_path, SPLIT[way], max_steps=9, train__checkpoint_every=1)
    tree["optim"]["learning_rate"] = 1e36
    config = write_config(tree, tmp_path / "c.yaml")
    command = [BIN / "torchrun", "--nproc-per-node", "2", "--master-port", free_port()]
    done = run_command(*command, "-m", "disttrain", "train", config, timeout=280)
    assert done.returncode != 0
    assert "is not finite at step" in done.stderr
    assert "exitcode  : 3" in done.stderr
    kept = read_tensors(checkpoints(tmp_path / "dreambooth")[-1] / "trainables.safetensors")
    assert all(bool(value.isfinite().all()) for value in kept.values())


@pytest.mark.slow
@pytest.mark.parametrize("way", ["zero2", "zero3", "fsdp"])
def test_a_subject_leaves_no_memory_taken(way: str, tmp_path: Path) -> None:
    tree = settings(tmp_path, SPLIT[way], max_steps=1)
    tree["subjects"] = [{**tree["subjects"][0], "name": name} for name in ("fox", "owl")]
    out = probe("memory", tree, tmp_path / "c.yaml")
    left = [int(line.split()[1]) for line in out.splitlines() if line.startswith("left: ")]
    assert len(left) >= 2
    assert max(left) < 2**22


def test_all_ranks_go_on_from_the_checkpoint_that_rank_zero_chose(
    whole: Path, tmp_path: Path
) -> None:
    tree = settings(tmp_path, max_steps=4)
    tree["train"].update(checkpoint_every=2)
    folder = train_here(tree)
    assert len(checkpoints(folder)) == 2
    tree["train"].update(max_steps=5)
    assert "going on from step 4" in probe("stale", tree, tmp_path / "c.yaml")
    assert torch.allclose(losses(folder), losses(whole), rtol=1e-4)
    assert difference(folder, whole, "trainables") < 1e-4
