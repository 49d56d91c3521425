"""What a run leaves behind, how it goes on, and what it refuses; real runs in this process."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import METHODS, checkpoints, disttrain, small_config, train_here, write_config
from PIL import Image

from disttrain.errors import ConfigError, DataError, ModelError, TrainingFailed, UserError
from disttrain.files import read_tensors, sha256_file
from disttrain.models.base import load_base


def final_tensors(run: Path) -> dict[str, torch.Tensor]:
    """The trainables of a run's newest checkpoint."""
    return read_tensors(checkpoints(run)[-1] / "trainables.safetensors")


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


@pytest.mark.parametrize("method", METHODS)
def test_run_folder_holds_what_the_documentation_says(
    trained: dict[str, Path], method: str
) -> None:
    run = trained[method]
    names = {path.name for path in checkpoints(run)}
    assert names == {"step-00000003", "step-00000006"}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(row["loss"]) and row["gradient_norm"] > 0 for row in rows)
    subject = run / "subjects/fox"
    assert (
        (subject / "loss.csv").read_bytes().startswith(b"step,epoch,epoch_step,loss,learn_rate\r\n")
    )
    assert "<svg" in (subject / "loss.svg").read_text()
    previews = sorted(path.name for path in (subject / "samples").iterdir())
    assert previews == ["00000000-0.png", "00000003-0.png", "00000006-0.png"]
    environment = json.loads((run / "environment.json").read_text())
    assert environment["learning_rate"]["factor"] == 1.0
    assert environment["world_size"] == 1
    if method == "dreambooth":
        assert (subject / "model/model_index.json").is_file()
    else:
        assert (subject / "fox.safetensors").is_file()
        assert (subject / "steps/fox-00000003.safetensors").is_file()


@pytest.mark.parametrize("method", METHODS)
def test_previews_change_nothing_and_same_seed_gives_the_same_file(
    trained: dict[str, Path], method: str, tmp_path: Path
) -> None:
    run = train_here(small_config(method, tmp_path))
    assert same_bits(final_tensors(run), final_tensors(trained[method]))
    one, two = (checkpoints(r)[-1] for r in (run, trained[method]))
    for name in ("trainables.safetensors", "optimizer.safetensors"):
        assert sha256_file(one / name) == sha256_file(two / name)


def test_textual_inversion_changes_its_rows_only(tmp_path: Path, trained: dict[str, Path]) -> None:
    checkpoint = checkpoints(trained["textual_inversion"])[-1]
    tensors = read_tensors(checkpoint / "trainables.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {"tokens": (1, 2, 64)}
    optimizer = read_tensors(checkpoint / "optimizer.safetensors")
    assert sum(t.numel() for t in optimizer.values()) == 2 * 2 * 64 + 1
    from disttrain.config_file import parse_config
    from disttrain.methods.textual_inversion import TextualInversion

    config = parse_config(small_config("textual_inversion", tmp_path))
    base = load_base("tiny")
    before = base.text_encoder.get_input_embeddings().weight.clone()
    method = TextualInversion(base, [config])
    ids = method.tokenizer.ids("a <fox> here", "<fox>")[None]
    base.text_encoder(input_ids=ids).last_hidden_state.sum().backward()
    assert method.embedding.rows.grad is not None
    assert all(
        p.grad is None for p in base.text_encoder.parameters() if p is not method.embedding.rows
    )
    assert torch.equal(method.embedding.base.weight, before)


def test_finished_run_says_so_and_goes_on_when_max_steps_is_raised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = small_config("lora", tmp_path / "short")
    run = train_here(short)
    before = (run / "metrics.jsonl").read_bytes()
    train_here(short)
    assert "is finished at step 6" in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_bytes() == before
    train_here(small_config("lora", tmp_path / "short", max_steps=8))
    whole = train_here(small_config("lora", tmp_path / "whole", max_steps=8))
    assert same_bits(final_tensors(run), final_tensors(whole))


def test_fresh_starts_in_a_new_folder(tmp_path: Path) -> None:
    tree = small_config("textual_inversion", tmp_path, max_steps=2)
    for fresh in (False, True, True):
        train_here(tree, fresh=fresh)
    results = sorted(path.parts[-4] for path in tmp_path.glob("*/subjects/fox/fox.safetensors"))
    assert results == ["textual_inversion", "textual_inversion-2", "textual_inversion-3"]
    assert len({sha256_file(path) for path in tmp_path.glob("*/subjects/fox/*.safetensors")}) == 1


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    tree = small_config("textual_inversion", tmp_path, max_steps=2)
    train_here(tree)
    tree["optim"]["learning_rate"] = 7.0
    tree["train"]["max_steps"] = 4
    with pytest.raises(ConfigError, match=r"optim.learning_rate \(0.005 -> 7.0\)"):
        train_here(tree)


def test_changed_pictures_are_refused_by_name(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(3):
        Image.new("RGB", (64, 64), (40 * i, 0, 0)).save(pictures / f"{i}.png")
    tree = small_config("textual_inversion", tmp_path, max_steps=2)
    tree["subjects"][0]["images"] = str(pictures)
    train_here(tree)
    Image.new("RGB", (64, 64), (0, 200, 0)).save(pictures / "1.png")
    tree["train"]["max_steps"] = 4
    with pytest.raises(UserError, match="fox: its pictures changed"):
        train_here(tree)


def test_not_finite_loss_stops_before_the_weights_change(tmp_path: Path) -> None:
    from disttrain.methods.objective import Denoiser

    whole = Denoiser.forward
    calls = 0

    def poisoned(self: Denoiser, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        losses = whole(self, batch)
        return losses * float("nan") if calls == 5 else losses

    patch = pytest.MonkeyPatch()
    patch.setattr(Denoiser, "forward", poisoned)
    tree = small_config("lora", tmp_path, checkpoint_every=1)
    try:
        with pytest.raises(TrainingFailed, match="of fox is not finite at step 5") as caught:
            train_here(tree)
    finally:
        patch.undo()
    assert caught.value.exit_code == 3
    newest = checkpoints(tmp_path / "lora")[-1]
    assert newest.name == "step-00000004"
    run = train_here(tree)
    assert same_bits(
        final_tensors(run), final_tensors(train_here(small_config("lora", tmp_path / "w")))
    )


def test_dreambooth_subjects_are_trained_one_after_another(tmp_path: Path) -> None:
    tree = small_config("dreambooth", tmp_path, max_steps=2)
    second = {**tree["subjects"][0], "name": "penguin", "token": "olis"}
    second["images"] = str(Path("examples/subjects/penguin"))
    tree["subjects"].append(second)
    run = train_here(tree)
    assert json.loads((run / "progress.json").read_text()) == {"finished": {"fox": 2, "penguin": 2}}
    alone = small_config("dreambooth", tmp_path / "alone", max_steps=2)
    alone["subjects"] = [second]
    weights = "subjects/penguin/model/unet/diffusion_pytorch_model.safetensors"
    assert sha256_file(run / weights) == sha256_file(train_here(alone) / weights)


def test_packed_subjects_end_as_each_alone(tmp_path: Path) -> None:
    """Two LoRA subjects in one pack against each by itself: the house's one idea."""
    tree = small_config("lora", tmp_path)
    second = {**tree["subjects"][0], "name": "penguin", "token": "olis"}
    second["images"] = str(Path("examples/subjects/penguin"))
    both = {**tree, "name": "both", "subjects": [tree["subjects"][0], second]}
    run = train_here(both)
    for subject in both["subjects"]:
        packed = read_tensors(checkpoints(run, subject["name"])[-1] / "trainables.safetensors")
        alone = {**tree, "name": subject["name"], "subjects": [subject]}
        solo = final_tensors(train_here(alone))
        for name, tensor in solo.items():
            close = torch.allclose(packed[name], tensor, rtol=1e-4, atol=1e-5)
            assert close, f"{subject['name']} {name}"


REFUSED = [
    ("subjects.0.images=nowhere", ConfigError, "subjects.0.images"),
    ("subjects.0.token=cat", ConfigError, "vocabulary already holds 'cat'"),
    ("subjects.0.token=<Fox>", ConfigError, "subjects.0.token: '<Fox>' has capitals"),
    ("base_model=nowhere/at/all", ModelError, "base_model"),
    ("method.init_text='   '", ConfigError, "method.init_text"),
    ("subjects.0.template=none.txt", DataError, "none.txt line 1"),
    ("data.resolution=60", ConfigError, "data.resolution"),
]


@pytest.mark.parametrize(("override", "kind", "message"), REFUSED)
def test_refusals_leave_nothing_behind(
    tmp_path: Path, override: str, kind: type[UserError], message: str
) -> None:
    from disttrain import schema

    tree = schema.apply_overrides(small_config("textual_inversion", tmp_path / "out"), [override])
    with pytest.raises(kind, match=message):
        train_here(tree)
    assert not (tmp_path / "out").exists()


def test_empty_class_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "classes").mkdir()
    tree = small_config("dreambooth", tmp_path / "out")
    tree["subjects"][0]["class_images"] = str(tmp_path / "classes")
    with pytest.raises(DataError, match="no pictures"):
        train_here(tree)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_changes_nothing_but_memory(
    method: str, trained: dict[str, Path], tmp_path: Path
) -> None:
    tree = small_config(method, tmp_path, gradient_checkpointing=True)
    left, right = final_tensors(train_here(tree)), final_tensors(trained[method])
    assert all(torch.allclose(left[name], right[name], rtol=1e-4, atol=1e-5) for name in right)


@pytest.mark.parametrize("method", METHODS)
def test_bf16_trains_close_to_full_precision(
    method: str, trained: dict[str, Path], tmp_path: Path
) -> None:
    preview = {"sample_prompts": ["a photo of {token}"], "sample_every": 3, "sample_steps": 2}
    tree = small_config(method, tmp_path, **preview)
    tree["mixed_precision"] = "bf16"
    run = train_here(tree)
    assert all(tensor.dtype == torch.float32 for tensor in final_tensors(run).values())
    losses = [
        [json.loads(row)["loss"] for row in (r / "metrics.jsonl").read_text().splitlines()]
        for r in (run, trained[method])
    ]
    assert losses[0] != losses[1], "nothing ran in another precision"
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_models_of_another_kind_train_and_keep_it(tmp_path: Path) -> None:
    tree = small_config("dreambooth", tmp_path, max_steps=2)
    tree["base_prediction_type"] = "epsilon"
    run = train_here(tree)
    saved = json.loads((run / "subjects/fox/model/scheduler/scheduler_config.json").read_text())
    assert saved["prediction_type"] == "epsilon"
    plain = train_here(small_config("dreambooth", tmp_path / "plain", max_steps=2))
    first, other = (
        json.loads((r / "metrics.jsonl").read_text().splitlines()[0])["loss"] for r in (run, plain)
    )
    assert np.isfinite(first)
    assert first != pytest.approx(other, rel=1e-3)


def test_tensorboard_gets_what_metrics_say(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train_here(small_config("lora", tmp_path, max_steps=3, trackers=["tensorboard"]))
    (events,) = [path for path in run.rglob("events.out.tfevents.*") if path.parent.name == "lora"]
    log = EventAccumulator(str(events)).Reload()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scalars = log.Scalars("loss/fox")
    assert [event.step for event in scalars] == [1, 2, 3]
    assert [event.value for event in scalars] == pytest.approx([row["loss"] for row in rows])


def test_missing_class_pictures_are_drawn_once(tmp_path: Path) -> None:
    tree = small_config("dreambooth", tmp_path, max_steps=1)
    tree["method"].update(num_class_images=10, class_infer_steps=2)
    train_here(tree)
    drawn = sorted((tmp_path / ".cache/class_images").rglob("*.png"))
    assert [path.name for path in drawn] == ["00000.png", "00001.png"]  # 8 of 10 were given
    stamps = [path.stat().st_mtime_ns for path in drawn]
    train_here(tree, fresh=True)
    assert [path.stat().st_mtime_ns for path in drawn] == stamps


def messy_folder(folder: Path) -> Path:
    """A folder as people have them: all kinds of pictures, captions, and other files."""
    folder.mkdir()
    noise = np.random.default_rng(0)

    def pixels(*shape: int) -> np.ndarray:
        return noise.integers(0, 255, shape, dtype=np.uint8)

    Image.fromarray(pixels(90, 200, 3)).save(folder / "wide.jpg")
    Image.fromarray(pixels(300, 70, 3)).save(folder / "tall.webp")
    Image.fromarray(pixels(80, 80, 4)).save(folder / "transparent.png")
    Image.fromarray(pixels(50, 60)).save(folder / "grey.png")
    turned = Image.fromarray(pixels(40, 120, 3))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "turned.jpg", exif=exif)
    Image.fromarray(pixels(64, 64, 3)).convert("P").save(folder / "palette.gif")
    Image.fromarray(pixels(64, 64, 3)).convert("CMYK").save(folder / "print.jpg")
    (folder / "wide.txt").write_text("a wide one")
    (folder / "notes.docx").write_bytes(b"not a picture")
    return folder


def test_messy_folder_works_and_a_broken_picture_is_named(tmp_path: Path) -> None:
    folder = messy_folder(tmp_path / "pictures")
    tree = small_config("lora", tmp_path / "out", max_steps=3)
    tree["subjects"][0].update(
        images=str(folder), instance_prompt="{token} {class_name}, {caption}"
    )
    config = write_config(tree, tmp_path / "config.yaml")
    done = disttrain("train", config)
    assert done.returncode == 0, done.stderr
    assert "notes.docx" in done.stdout
    (folder / "broken.png").write_bytes((folder / "grey.png").read_bytes()[:200])
    again = disttrain("train", config, "--fresh")
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1
    assert "broken.png" in again.stderr
    assert not (tmp_path / "out/lora-2").exists()


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    config = write_config(small_config("lora", tmp_path / "out"), tmp_path / "config.yaml")
    done = disttrain("train", config, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "10 pictures" in done.stdout
    assert "nothing was written" in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ends", ["done", "failed"])
def test_nothing_holds_the_model_when_the_processes_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """Destroying the process group under a live model can hang (see `Mesh.__exit__`)."""
    from disttrain.engine.distributed import Mesh
    from disttrain.engine.pack import Pack

    alive: list[int] = []
    leave = Mesh.__exit__

    def watched(self: Mesh, *error: object) -> None:
        leave(self, *error)  # type: ignore[arg-type]
        alive.append(len(self._prepared))

    def refused(self: Pack, losses: list[float]) -> list[float]:
        raise TrainingFailed("planted")

    monkeypatch.setattr(Mesh, "__exit__", watched)
    tree = small_config("lora", tmp_path, max_steps=1)
    if ends == "failed":
        monkeypatch.setattr(Pack, "update", refused)
        with pytest.raises(TrainingFailed, match="planted"):
            train_here(tree)
    else:
        train_here(tree)
    assert alive == [0]
