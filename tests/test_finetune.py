"""Full fine-tuning, the average of its weights, buckets, and training without a latent cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, checkpoints, disttrain, small_config, train_here, write_config

from disttrain.data.shards import write_shards
from disttrain.engine.checkpoint import read_checkpoint
from disttrain.errors import DataError
from disttrain.files import read_tensors

DOLPHIN = ROOT / "examples/subjects/dolphin"


def finetune(output: Path, images: Path = DOLPHIN, **train: Any) -> dict[str, Any]:
    return {
        "name": "finetune",
        "output_dir": str(output),
        "method": {"name": "finetune", "train_text_encoder": True},
        "subjects": [{"name": "dolphin", "images": str(images)}],
        "data": {"resolution": 64, "batch_size": 4, "center_crop": False, "random_flip": True},
        "captions": {"dropout": 0.2},
        "optim": {"learning_rate": 1e-4, "scale_lr": "none", "ema_decay": 0.9},
        "train": {"max_steps": 6, "checkpoint_every": 3, **train},
    }


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_tensors(checkpoints(run)[-1] / "trainables.safetensors")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_here(finetune(tmp_path_factory.mktemp("finetune")))


def test_the_result_is_the_average_as_a_whole_model(run: Path) -> None:
    from disttrain.models.base import load_base

    checkpoint = read_checkpoint(checkpoints(run)[-1])
    assert checkpoint.average.keys() == checkpoint.trainables.keys()
    result = load_base(str(run / "subjects/dolphin/model"))
    start = load_base("tiny")
    for part, before, after in [
        ("unet", start.unet, result.unet),
        ("text_encoder", start.text_encoder, result.text_encoder),
    ]:
        fresh = dict(before.named_parameters())
        for name, value in after.named_parameters():
            assert torch.equal(value, checkpoint.average[f"{part}.{name}"])
        assert any(not torch.equal(value, fresh[n]) for n, value in after.named_parameters())
    for name, value in checkpoint.average.items():
        if not torch.equal(value, checkpoint.trainables[name]):
            break
    else:
        pytest.fail("the average is the last step's weights")


def test_an_average_goes_on_from_its_checkpoint(run: Path, tmp_path: Path) -> None:
    train_here(finetune(tmp_path, max_steps=3))
    again = train_here(finetune(tmp_path))
    left, right = (read_checkpoint(checkpoints(path)[-1]) for path in (run, again))
    assert all(torch.equal(left.average[name], right.average[name]) for name in left.average)
    assert all(torch.equal(left.trainables[n], right.trainables[n]) for n in left.trainables)


@pytest.mark.slow
def test_no_average_unless_asked_for(tmp_path: Path) -> None:
    tree = finetune(tmp_path, max_steps=1)
    del tree["optim"]["ema_decay"]
    checkpoint = read_checkpoint(checkpoints(train_here(tree))[-1])
    assert checkpoint.average == {}


def test_lora_can_have_an_average_too(tmp_path: Path) -> None:
    results = []
    for decay in (0.0, 0.99):
        tree = small_config("lora", tmp_path / str(decay))
        tree["optim"]["ema_decay"] = decay
        run = train_here(tree)
        results.append((weights(run), read_tensors(run / "subjects/fox/fox.safetensors")))
    assert all(torch.equal(results[0][0][n], results[1][0][n]) for n in results[0][0])
    ups = [name for name in results[0][1] if name.endswith("lora_up.weight")]
    assert ups
    assert not any(torch.equal(results[0][1][name], results[1][1][name]) for name in ups)


@pytest.mark.parametrize("workers", [0, 2])
def test_decoding_while_training_is_the_same_training(tmp_path: Path, workers: int) -> None:
    """Without crops and mirroring, pixels and cached latents are the same pictures."""
    ends = []
    for cached in (True, False):
        tree = finetune(tmp_path / f"{cached}")
        tree["data"] |= {"center_crop": True, "random_flip": False, "cache_latents": cached}
        if not cached:
            tree["data"]["num_workers"] = workers
        run = train_here(tree)
        ends.append((losses(run), weights(run)))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-4)
    gap = max((ends[0][1][n] - ends[1][1][n]).abs().max().item() for n in ends[0][1])
    assert gap < 1e-4
    assert not (tmp_path / "False/.cache/latents").exists()


@pytest.mark.slow
def test_half_precision_latents_are_near_and_half_as_large(tmp_path: Path) -> None:
    seen = []
    for precision in ("float32", "float16"):
        tree = finetune(tmp_path / precision, max_steps=3)
        tree["data"]["latent_precision"] = precision
        run = train_here(tree)
        files = (tmp_path / precision / ".cache/latents").rglob("*.safetensors")
        seen.append((losses(run), sum(path.stat().st_size for path in files)))
    assert seen[0][0] != seen[1][0]
    assert seen[0][0] == pytest.approx(seen[1][0], rel=1e-2)
    assert seen[1][1] < 0.7 * seen[0][1]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captioned pictures of three shapes."""
    from disttrain.data.images import decode, encode_png
    from disttrain.data.window import fit

    folder = tmp_path_factory.mktemp("mixed")
    shapes = [(64, 64), (48, 80), (80, 48)]
    for number, path in enumerate(sorted(DOLPHIN.glob("*.jpg"))):
        pixels = fit(decode(path.read_bytes(), path.name).pixels, *shapes[number % 3])
        (folder / f"{path.stem}.png").write_bytes(encode_png(pixels))
        shutil.copy(path.with_suffix(".txt"), folder)
    return folder


def bucketed(output: Path, images: Path, **data: Any) -> dict[str, Any]:
    tree = finetune(output, images)
    tree["data"] |= {"aspect_ratio_buckets": True, "bucket_step": 16, **data}
    return tree


@pytest.mark.parametrize("cached", [True, False])
def test_buckets_train_whole_pictures(mixed: Path, tmp_path: Path, cached: bool) -> None:
    extra = {"cache_latents": cached} | ({} if cached else {"num_workers": 0})
    config = write_config(bucketed(tmp_path, mixed, **extra), tmp_path / "config.yaml")
    done = disttrain("train", config)
    assert done.returncode == 0, done.stderr
    assert "pictures by size 48x80: 3, 64x64: 4, 80x48: 3" in done.stdout
    assert "2 of 12 places of an epoch repeat a picture" in done.stdout
    if cached:
        names = {path.name for path in (tmp_path / ".cache/latents").iterdir()}
        assert {n.split("-")[1] for n in names} == {"80x48", "64x64", "48x80"}


@pytest.mark.slow
def test_buckets_without_a_cache_equal_those_with(mixed: Path, tmp_path: Path) -> None:
    found = []
    for cached in (True, False):
        extra = {"cache_latents": cached, "center_crop": True, "random_flip": False}
        found.append(losses(train_here(bucketed(tmp_path / str(cached), mixed, **extra))))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.slow
def test_class_pictures_take_the_size_of_the_subjects(mixed: Path, tmp_path: Path) -> None:
    tree = small_config("dreambooth", tmp_path)
    tree["subjects"][0]["images"] = str(mixed)
    tree["data"] |= {"aspect_ratio_buckets": True, "bucket_step": 16}
    run = train_here(tree)
    assert len(losses(run)) == 6


@pytest.mark.slow
def test_subjects_of_several_sizes_train_one_after_another(mixed: Path, tmp_path: Path) -> None:
    tree = small_config("lora", tmp_path, max_steps=2)
    tree["data"] |= {"aspect_ratio_buckets": True, "bucket_step": 16}
    tree["subjects"].append({**tree["subjects"][0], "name": "two", "images": str(mixed)})
    run = train_here(tree)
    assert len(losses(run)) == 4
    assert (run / "subjects/fox/fox.safetensors").is_file()
    assert (run / "subjects/two/two.safetensors").is_file()


def test_shards_train_like_their_folder(run: Path, tmp_path: Path) -> None:
    index = write_shards(DOLPHIN, tmp_path / "shards")
    from_shards = train_here(finetune(tmp_path, index))
    assert losses(from_shards) == losses(run)


def test_cache_computes_once(tmp_path: Path) -> None:
    tree = finetune(tmp_path)
    tree["method"]["train_text_encoder"] = False
    config = write_config(tree, tmp_path / "config.yaml")
    first = disttrain("cache", config)
    assert first.returncode == 0, first.stderr
    assert "pictures encoded now: 20; prompts encoded now: 11" in first.stdout
    assert not (tmp_path / "finetune").exists()
    second = disttrain("cache", config)
    assert "pictures encoded now: 0; prompts encoded now: 0" in second.stdout
    done = disttrain("train", config)
    assert done.returncode == 0, done.stderr
    assert "latents of" not in done.stdout


def damage(index: Path, count: int) -> None:
    """Turn a byte in the first pictures of a set of shards."""
    from disttrain.data.index import ShardIndex

    opened = ShardIndex(index)
    tar = bytearray(Path(opened.places[0]).read_bytes())
    for number in range(count):
        row = opened.row(number)
        tar[row.offset + row.size // 2] ^= 1
    Path(opened.places[0]).write_bytes(tar)


@pytest.mark.parametrize("cached", [True, False])
def test_damaged_pictures_within_the_budget(tmp_path: Path, cached: bool) -> None:
    index = write_shards(DOLPHIN, tmp_path / "shards")
    damage(index, 2)
    tree = finetune(tmp_path, index)
    tree["data"]["cache_latents"] = cached
    with pytest.raises(DataError, match="damaged"):
        train_here(tree)
    tree["data"]["max_damaged"] = 0.1
    with pytest.raises(DataError, match=r"2 of 10 pictures cannot be used \(1 may be\)"):
        train_here(tree)
    tree["data"]["max_damaged"] = 0.2
    done = disttrain("train", write_config(tree, tmp_path / "config.yaml"))
    assert done.returncode == 0, done.stderr
    assert "passed over" in done.stdout
