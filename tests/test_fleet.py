"""Fleets: a subject ends as it would alone, whatever its neighbours are and befalls them."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, checkpoints, forget_accelerate, small_config
from torch import Tensor

from disttrain.config import RunConfig
from disttrain.engine.checkpoint import read_checkpoint
from disttrain.engine.fleet import train_fleet
from disttrain.errors import ConfigError
from disttrain.files import read_tensors
from disttrain.manifest import read_manifest

EXAMPLES = ("fox", "penguin", "octopus", "dolphin", "dragon")
TOKENS = ("sks", "ohwx", "olis", "hta")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight subjects with 3 to 10 pictures each."""
    folder = tmp_path_factory.mktemp("subjects")
    for number in range(8):
        source = sorted((ROOT / "examples/subjects" / EXAMPLES[number % 5]).glob("*.[jp][pn]g"))
        (folder / f"s{number}").mkdir()
        for path in source[: 3 + number]:
            shutil.copy(path, folder / f"s{number}")
    return folder


def rows_of(pictures: Path, method: str, count: int = 8) -> list[dict[str, Any]]:
    """Subjects that differ in everything that may differ."""
    return [
        {
            "name": f"s{number}",
            "images": str(pictures / f"s{number}"),
            "token": f"<s{number}>" if method == "textual_inversion" else TOKENS[number % 4],
            "class_name": EXAMPLES[number % 5],
            "train.max_steps": 3 + number % 4,
            "optim.learning_rate": 1e-3 * (1 + number),
            "optim.max_grad_norm": 0.05 if number % 2 else 1.0,
            "optim.lr_schedule": "cosine" if number % 3 else "constant",
            "seed": number // 3,
        }
        for number in range(count)
    ]


def members_of(
    rows: list[dict[str, Any]], method: str, output: Path, pack_size: int | str, **train: Any
) -> list[RunConfig]:
    tree = small_config(method, output, checkpoint_every=2, gradient_accumulation_steps=2, **train)
    tree["data"]["batch_size"] = 2
    tree["fleet"] = {"pack_size": pack_size}
    if method == "lora":
        tree["method"] |= {"num_class_images": 5, "prior_loss_weight": 0.7}
        tree["subjects"][0]["class_images"] = str(ROOT / "examples/class_pictures/animal_face")
    manifest = output / "manifest.yaml"
    manifest.parent.mkdir(parents=True, exist_ok=True)
    import yaml

    manifest.write_text(yaml.safe_dump(rows))
    return read_manifest(manifest, tree)


def run_fleet(members: list[RunConfig], retry: bool = False) -> tuple[Path, int]:
    try:
        failed = train_fleet(members, retry)
    finally:
        forget_accelerate()
    return members[0].folder, failed


def ends(run: Path, names: list[str], whole: bool = False) -> dict[str, dict[str, Tensor]]:
    """What each subject learned; with the optimizer's state if `whole`."""
    found = {name: read_checkpoint(checkpoints(run, name)[-1]) for name in names}
    return {
        name: {**state.trainables, **(state.optimizer if whole else {})}
        for name, state in found.items()
    }


def table(run: Path) -> dict[str, dict[str, str]]:
    with (run / "fleet.csv").open(newline="") as handle:
        return {row["name"]: row for row in csv.DictReader(handle)}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether weights are equal to single precision."""
    assert left.keys() == right.keys()
    return all((left[name] - right[name]).abs().max() <= 1e-4 for name in left)


def exactly(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether tensors are equal to 1e-10 of their largest value."""
    assert left.keys() == right.keys()
    gaps = {name: (left[name] - right[name]).abs().max() for name in left}
    return all(gap <= 1e-10 * right[name].abs().max() for name, gap in gaps.items())


@pytest.mark.parametrize("method", ["textual_inversion", "lora"])
def test_a_pack_of_eight_is_each_alone(method: str, pictures: Path, tmp_path: Path) -> None:
    rows = rows_of(pictures, method)
    names = [row["name"] for row in rows]
    alone, failed = run_fleet(members_of(rows, method, tmp_path / "alone", 1))
    assert failed == 0
    expected = ends(alone, names)
    orders = {"eight": (rows, 8), "refilled": (rows, 3), "reversed": (rows[::-1], 3)}
    for name, (order, size) in orders.items():
        run, failed = run_fleet(members_of(order, method, tmp_path / name, size))
        assert failed == 0
        for subject, found in ends(run, names).items():
            assert same(found, expected[subject]), f"{name}: {subject}"
        told = table(run)
        assert [row["status"] for row in told.values()] == ["finished"] * 8
        assert {n: int(row["steps"]) for n, row in told.items()} == {
            row["name"]: row["train.max_steps"] for row in rows
        }
        for subject in names:
            assert (run / "subjects" / subject / f"{subject}.safetensors").is_file()
            lines = (run / "subjects" / subject / "metrics.jsonl").read_text().splitlines()
            assert len(lines) == int(told[subject]["steps"])


def test_the_settings_of_a_subject_train_it_alone(pictures: Path, tmp_path: Path) -> None:
    """`disttrain train subjects/NAME/config.yaml` is the subject without the fleet."""
    from disttrain import schema
    from disttrain.config_file import parse_config
    from disttrain.engine.train import train

    rows = rows_of(pictures, "lora", 3)
    run, _ = run_fleet(members_of(rows, "lora", tmp_path / "fleet", 3))
    tree = schema.read_mapping(run / "subjects/s1/config.yaml")
    tree["output_dir"] = str(tmp_path / "alone")
    try:
        train(parse_config(tree))
    finally:
        forget_accelerate()
    expected = ends(tmp_path / "alone/lora", ["s1"])["s1"]
    assert same(ends(run, ["s1"])["s1"], expected)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that trains in float64."""
    from disttrain.engine.distributed import Mesh
    from disttrain.methods.batch import Batcher
    from disttrain.methods.lora import Lora
    from disttrain.methods.textual_inversion import TextualInversion

    def widened(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.double() if v.is_floating_point() else v for k, v in values.items()}

    whole = Batcher.batch
    monkeypatch.setattr(Batcher, "batch", lambda self, *turn: widened(whole(self, *turn)))
    monkeypatch.setattr(Mesh, "weight_dtype", torch.float64)
    for kind in (Lora, TextualInversion):
        start = kind.initial
        monkeypatch.setattr(
            kind, "initial", lambda self, member, start=start: widened(start(self, member))
        )


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    "method", ["textual_inversion", pytest.param("lora", marks=pytest.mark.slow)]
)
def test_in_double_precision_a_pack_is_exactly_each_alone(
    method: str, pictures: Path, tmp_path: Path
) -> None:
    rows = rows_of(pictures, method)
    names = [row["name"] for row in rows]
    alone, _ = run_fleet(members_of(rows, method, tmp_path / "alone", 1))
    expected = ends(alone, names, whole=True)
    assert all(t.dtype == torch.float64 for t in expected["s0"].values())
    for size in (8, 3):
        run, _ = run_fleet(members_of(rows, method, tmp_path / str(size), size))
        for subject, found in ends(run, names, whole=True).items():
            assert exactly(found, expected[subject]), f"pack of {size}: {subject}"


def poison(monkeypatch: pytest.MonkeyPatch, name: str, step: int) -> None:
    """The loss of a subject is not a number from a step on."""
    from disttrain.engine.pack import Pack

    whole = Pack.losses

    def losses(self: Pack, micro: int) -> Tensor:
        found = whole(self, micro)
        factor = torch.ones_like(found)
        for i, slot in enumerate(self.slots):
            if slot.name == name and slot.step >= step:
                factor[i] = float("nan")
        return found * factor

    monkeypatch.setattr(Pack, "losses", losses)


def test_not_a_number_fails_its_subject_alone(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(pictures, "lora", 5)
    names = [row["name"] for row in rows]
    whole, _ = run_fleet(members_of(rows, "lora", tmp_path / "whole", 5))
    expected = ends(whole, names)
    with monkeypatch.context() as patch:
        poison(patch, "s2", 3)
        run, failed = run_fleet(members_of(rows, "lora", tmp_path / "poisoned", 3))
    assert failed == 1
    told = table(run)
    assert told["s2"]["status"] == "failed"
    assert "not finite at step 4" in told["s2"]["reason"]
    assert told["s2"]["steps"] == "3"
    for name in names:
        if name != "s2":
            assert told[name]["status"] == "finished"
            assert same(ends(run, [name])[name], expected[name]), name
    # Not tried again by itself; with the flag it goes on from its checkpoint and ends as ever.
    assert run_fleet(members_of(rows, "lora", tmp_path / "poisoned", 3))[1] == 1
    assert run_fleet(members_of(rows, "lora", tmp_path / "poisoned", 3), retry=True)[1] == 0
    assert same(ends(run, ["s2"])["s2"], expected["s2"])


def test_a_broken_picture_fails_its_subject_alone(pictures: Path, tmp_path: Path) -> None:
    rows = rows_of(pictures, "textual_inversion", 4)
    shutil.copytree(pictures / "s1", tmp_path / "broken")
    path = next((tmp_path / "broken").iterdir())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    rows[1]["images"] = str(tmp_path / "broken")
    rows[2]["token"] = "fox"  # a word that the vocabulary holds
    run, failed = run_fleet(members_of(rows, "textual_inversion", tmp_path / "fleet", 4))
    told = table(run)
    assert failed == 2
    assert [told[f"s{i}"]["status"] for i in range(4)] == [
        "finished",
        "failed",
        "failed",
        "finished",
    ]
    assert path.name in told["s1"]["reason"]
    assert "already holds 'fox'" in told["s2"]["reason"]
    path.write_bytes(whole)
    rows[2]["token"] = "<s2>"
    again = members_of(rows, "textual_inversion", tmp_path / "fleet", 4)
    assert run_fleet(again, retry=True)[1] == 0


@pytest.mark.slow
def test_out_of_memory_makes_smaller_packs(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from disttrain.engine.pack import Pack

    rows = rows_of(pictures, "lora", 5)
    names = [row["name"] for row in rows]
    expected = ends(run_fleet(members_of(rows, "lora", tmp_path / "whole", 5))[0], names)
    whole, sizes = Pack.losses, []

    def losses(self: Pack, micro: int) -> Tensor:
        sizes.append(len(self.slots))
        if len(self.slots) > 2 and max(slot.step for slot in self.slots) >= 1:
            raise torch.OutOfMemoryError("no memory")
        return whole(self, micro)

    monkeypatch.setattr(Pack, "losses", losses)
    run, failed = run_fleet(members_of(rows, "lora", tmp_path / "small", 5))
    assert failed == 0
    assert max(sizes[3:]) <= 2
    for name in names:
        assert same(ends(run, [name])[name], expected[name]), name


@pytest.mark.slow
def test_pack_size_auto_changes_nothing_that_trains(pictures: Path, tmp_path: Path) -> None:
    rows = rows_of(pictures, "lora", 4)
    names = [row["name"] for row in rows]
    expected = ends(run_fleet(members_of(rows, "lora", tmp_path / "four", 4))[0], names)
    automatic = members_of(rows, "lora", tmp_path / "auto", "auto")
    run, _ = run_fleet(automatic)
    for name in names:
        assert same(ends(run, [name])[name], expected[name]), name


def test_rows_that_are_added_are_trained_and_nothing_else(pictures: Path, tmp_path: Path) -> None:
    rows = rows_of(pictures, "lora", 4)
    run, _ = run_fleet(members_of(rows[:2], "lora", tmp_path, 2))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    run_fleet(members_of(rows, "lora", tmp_path, 2))
    assert [row["status"] for row in table(run).values()] == ["finished"] * 4
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_dreambooth_goes_through_the_same_queue(pictures: Path, tmp_path: Path) -> None:
    rows = [
        {k: v for k, v in row.items() if k != "optim.learning_rate"}
        for row in rows_of(pictures, "dreambooth", 2)
    ]
    run, failed = run_fleet(members_of(rows, "dreambooth", tmp_path, 8))
    assert failed == 0
    for name in ("s0", "s1"):
        assert (run / f"subjects/{name}/model/model_index.json").is_file()


def test_subjects_of_other_kinds_train_in_packs_of_their_own(
    pictures: Path, tmp_path: Path
) -> None:
    rows = rows_of(pictures, "lora", 4)
    for row in rows[2:]:
        row["method.rank"] = 2
    run, failed = run_fleet(members_of(rows, "lora", tmp_path, 4))
    assert failed == 0
    ranks = [
        next(
            v.shape[0]
            for k, v in read_tensors(run / f"subjects/s{i}/s{i}.safetensors").items()
            if k.endswith("lora_down.weight")
        )
        for i in range(4)
    ]
    assert ranks == [4, 4, 2, 2]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ({"train": {"trackers": ["tensorboard"]}}, "train.trackers: not for fleets"),
        ({"data": {"cache_latents": False}}, "data.cache_latents: a fleet"),
    ],
)
def test_what_a_fleet_cannot_do_is_refused(
    override: dict[str, dict[str, Any]], words: str, pictures: Path, tmp_path: Path
) -> None:
    tree = small_config("lora", tmp_path)
    for section, values in override.items():
        tree[section] |= values
    members = read_manifest(pictures, tree)
    with pytest.raises(ConfigError, match=words):
        run_fleet(members)
    assert not (tmp_path / "lora").exists()


def test_changed_pictures_or_settings_stop_their_subject_alone(
    pictures: Path, tmp_path: Path
) -> None:
    rows = rows_of(pictures, "lora", 4)
    for number in (0, 1):
        shutil.copytree(pictures / f"s{number}", tmp_path / f"p{number}")
        rows[number]["images"] = str(tmp_path / f"p{number}")
    run, _ = run_fleet(members_of(rows, "lora", tmp_path / "fleet", 4))
    for row in rows:
        row["train.max_steps"] += 2
    next((tmp_path / "p0").iterdir()).unlink()
    rows[2]["optim.learning_rate"] = 5e-4
    rows[1]["images"] = str(tmp_path / "moved")  # elsewhere, but the same
    (tmp_path / "p1").rename(tmp_path / "moved")
    _, failed = run_fleet(members_of(rows, "lora", tmp_path / "fleet", 4))
    assert failed == 2
    told = table(run)
    assert "its pictures changed" in told["s0"]["reason"]
    assert "its settings changed" in told["s2"]["reason"]
    assert "remove" in told["s2"]["reason"]
    assert [told[name]["status"] for name in ("s1", "s3")] == ["finished", "finished"]
    shutil.rmtree(run / "subjects/s2/checkpoints")
    _, failed = run_fleet(members_of(rows, "lora", tmp_path / "fleet", 4), retry=True)
    assert failed == 1
    assert table(run)["s2"]["status"] == "finished"


def test_a_lost_lease_is_let_go(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker took a subject from one that slept: the sleeper writes nothing of it."""
    from disttrain.engine.fleet_worker import FleetWorker

    rows = rows_of(pictures, "lora", 2)
    whole = FleetWorker.leave_marks
    seen: list[list[str]] = []

    def stolen(self: FleetWorker, pack: Any) -> None:
        claim = self.claims.folder / "s1.json"
        if claim.exists() and pack.slots[0].step == 1:
            claim.write_text(json.dumps({**json.loads(claim.read_text()), "token": "other"}))
            self._looked = float("-inf")
        whole(self, pack)
        seen.append([slot.name for slot in pack.active])

    monkeypatch.setattr(FleetWorker, "leave_marks", stolen)
    members = members_of(rows, "lora", tmp_path, 2)
    leaving = replace(members[0].fleet, wait_for_others=False)
    run, _ = run_fleet([replace(member, fleet=leaving) for member in members])
    assert seen[0] == ["s0"]
    assert table(run)["s0"]["status"] == "finished"
    assert not (run / "subjects/s1/s1.safetensors").exists()
    assert table(run)["s1"]["status"] == "training"
