"""Subjects that end when they are over-trained, with their best state as the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import checkpoints, forget_accelerate, train_here
from early_stop import RISE, RISE_AND_FALL, early_config, plant
from torch import Tensor

from disttrain import schema
from disttrain.config import TrainSettings
from disttrain.config_file import parse_config
from disttrain.engine import work as work_module
from disttrain.engine.checkpoint import read_checkpoint
from disttrain.engine.ending import End, at_end
from disttrain.engine.fleet import status_lines, train_fleet
from disttrain.engine.fleet_folder import FleetFolder
from disttrain.engine.history import History
from disttrain.engine.overtraining import verdict
from disttrain.engine.run import Run
from disttrain.engine.run_folder import RunFolder
from disttrain.engine.scores import Scores
from disttrain.engine.settings_keys import pack_key, settings_key, training_key
from disttrain.engine.slot import Slot
from disttrain.errors import ConfigError, DataError, UserError
from disttrain.files import read_tensors, sha256_file, write_json
from disttrain.manifest import read_manifest
from disttrain.review.score import Bench, ScoreRequest, members_of, score_subject

PENGUIN = {"name": "penguin", "token": "olis", "images": "examples/subjects/penguin"}


def scores(subject: float, error: float = 0.01) -> Scores:
    return Scores(subject, error, None, 0.0)


def filled(values: list[float], error: float = 0.01) -> History:
    history = History("same")
    for number, value in enumerate(values, start=1):
        history.add(100 * number, scores(value, error), held_out=True)
    return history


def steps_of(run: Path, name: str = "fox") -> list[int]:
    return [int(path.name.split("-")[1]) for path in checkpoints(run, name)]


def result(run: Path, name: str = "fox") -> Path:
    return run / f"subjects/{name}/{name}.safetensors"


def copy_of(run: Path, step: int, name: str = "fox") -> Path:
    return run / f"subjects/{name}/steps/{name}-{step:08d}.safetensors"


def weights_of(run: Path, step: int, name: str = "fox") -> dict[str, Tensor]:
    path = run / f"subjects/{name}/checkpoints/step-{step:08d}"
    return read_tensors(path / "trainables.safetensors")


def scored(run: Path, name: str = "fox") -> dict[str, Any]:
    """What the newest checkpoint holds of a subject's scores."""
    return read_checkpoint(checkpoints(run, name)[-1]).state["scored"]


# The history, by itself.


def test_a_history_survives_json_to_the_last_digit() -> None:
    history = filled([0.3, 0.6123456, 0.4])
    for loss in (0.1, 0.2, 1 / 3):
        history.add_loss(loss)
    saved = json.loads(json.dumps(history.saved()))
    assert History.restored(saved, "same") == history
    assert History.restored(saved, "other") == History("other")
    assert History.restored(None, "same") == History("same")
    assert history.readings[1].scores.subject == 0.6123
    assert (history.kept, history.overtrained_for) == (200, 1)


def test_a_reading_has_the_mean_loss_since_the_one_before() -> None:
    history = History()
    for step in range(1, 66):
        history.add_loss(float(step))
        if step in (25, 30, 60):
            history.add(step, scores(0.5), held_out=True)
    assert [reading.loss for reading in history.readings] == [13.0, None, 45.5]


def test_what_is_kept_is_as_good_as_what_the_verdict_picks() -> None:
    """The one it keeps stays, though a larger standard error makes an earlier one good enough."""
    history = History()
    for step, value, error in [(1, 0.50, 0.0), (2, 0.51, 0.0), (3, 0.52, 0.02)]:
        history.add(step, scores(value, error), held_out=True)
    assert verdict(history.readings, held_out=True).best_step == 1
    assert history.kept == 2


@pytest.mark.parametrize(
    ("changes", "steps", "overtrained", "ended"),
    [
        ({}, 9, 0, False),
        ({}, 10, 0, True),
        ({}, 9, 5, False),
        ({"early_stop": True}, 9, 2, False),
        ({"early_stop": True}, 9, 3, True),
        ({"early_stop": True}, 10, 0, True),
        ({"early_stop": True, "early_stop_patience": 4}, 9, 3, False),
    ],
)
def test_when_a_subject_is_at_its_end(
    changes: dict[str, Any], steps: int, overtrained: int, ended: bool
) -> None:
    train = TrainSettings(max_steps=10, **changes)
    assert at_end(train, steps, overtrained) is ended
    assert End(steps, 1, overtrained).holds(train) is ended


def test_progress_tells_which_state_a_result_is_of(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.mark_finished({"owl": End(9, 9)})
    assert json.loads(folder.progress.read_text()) == {"finished": {"owl": 9}}
    folder.mark_finished({"fox": End(8, 4, 2)})
    assert folder.finished() == {"owl": End(9, 9), "fox": End(8, 4, 2)}
    folder.mark_finished({"fox": End(9, 9)})
    assert json.loads(folder.progress.read_text()) == {"finished": {"owl": 9, "fox": 9}}
    damaged = (
        {"finished": 3},
        [],
        {"finished": {"a": "1"}},
        {"finished": {"a": 1.5}},
        {"finished": {"a": 1}, "scored": {"a": {"what": 2}}},
        {"finished": {"a": 1}, "scored": {"a": {"picked": "1"}}},
    )
    for damage in damaged:
        write_json(folder.progress, damage)
        with pytest.raises(DataError, match="not a progress file"):
            folder.finished()


def test_settings_that_choose_a_result_count_where_they_choose_it(tmp_path: Path) -> None:
    def keys(early: bool, override: str = "seed=0") -> tuple[str, str, str]:
        tree = schema.apply_overrides(early_config("lora", tmp_path, early_stop=early), [override])
        member = parse_config(tree)
        return settings_key(member), training_key(member), pack_key(member)

    off, on = keys(False), keys(True)
    assert off[0] != on[0]
    assert off[1] == on[1], "it may be switched on and off as the run goes on"
    assert off[2] != on[2], "a pack scores all or none"
    for override in ("score.pictures=5", "train.checkpoint_every=3", "train.early_stop_patience=9"):
        assert keys(False, override)[0] == off[0]
        assert keys(True, override)[0] != on[0]
        assert keys(True, override)[1] == on[1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.early_stop_patience=0", "train.early_stop_patience: 0 is impossible"),
        ("train.checkpoint_every=12", "train.early_stop: chooses among checkpoints"),
    ],
)
def test_what_cannot_be_chosen_from_is_refused(override: str, message: str, tmp_path: Path) -> None:
    tree = schema.apply_overrides(early_config("lora", tmp_path), [override])
    with pytest.raises(ConfigError, match=message):
        parse_config(tree)


def test_a_split_base_cannot_be_scored(tmp_path: Path) -> None:
    words = ["parallel.strategy=fsdp", "parallel.force=true"]
    tree = schema.apply_overrides(early_config("lora", tmp_path), words)
    with pytest.raises(ConfigError, match=r"train\.early_stop: draws, which a split base cannot"):
        parse_config(tree)


def test_what_scoring_needs_is_asked_for_before_anything_is_written(tmp_path: Path) -> None:
    tree = early_config("lora", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    tree["subjects"][0]["held_out"] = str(tmp_path / "empty")
    with pytest.raises(DataError, match="empty"):
        train_here(tree)
    tree["subjects"][0]["held_out"] = ""
    tree["score"]["features"] = "nobody/has-this"
    with pytest.raises(UserError, match=r"score\.features"):
        train_here(tree)
    assert not (tmp_path / "out").exists()


# Runs with planted scores.


@pytest.mark.parametrize("method", ["lora", "dreambooth"])
def test_an_overtrained_subject_ends_with_its_best_state(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, {"fox": RISE_AND_FALL})
    tree = early_config(method, tmp_path)
    if method == "lora":
        tree["optim"]["ema_decay"] = 0.9
    run = train_here(tree)
    assert "over-trained at the last 2 scorings, ends at step 8; its result is step 4" in (
        capsys.readouterr().out
    )
    assert RunFolder(run).finished() == {"fox": End(8, 4, 2)}
    assert steps_of(run) == [4, 6, 8], "the best one is not pruned"
    if method == "lora":
        assert result(run).read_bytes() == copy_of(run, 4).read_bytes()
        assert result(run).read_bytes() != copy_of(run, 8).read_bytes()
    else:
        model = read_tensors(run / "subjects/fox/model/unet/diffusion_pytorch_model.safetensors")
        best = weights_of(run, 4)
        assert all(torch.equal(value, best[f"unet.{name}"]) for name, value in model.items())
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 8

    train_here(tree)
    assert "is finished at step 8; raise train.early_stop_patience to go on" in (
        capsys.readouterr().out
    )
    tree["train"]["early_stop_patience"] = 5
    train_here(tree)
    assert RunFolder(run).finished() == {"fox": End(12, 4, 4)}
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 12
    tree["train"]["early_stop"] = False
    plain = train_here({**tree, "name": "plain"})
    last, expected = weights_of(run, 12), weights_of(plain, 12)
    assert all(torch.equal(last[name], expected[name]) for name in expected), "nothing was changed"
    assert "scored" not in read_checkpoint(checkpoints(plain)[-1]).state


def test_in_a_pack_each_ends_as_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone: to rounding. In a pack where nobody stops: to the bit."""
    plant(monkeypatch, {"fox": RISE_AND_FALL, "penguin": RISE})
    tree = early_config("lora", tmp_path)
    fox = tree["subjects"][0]
    penguin = {**fox, **PENGUIN}
    both = train_here({**tree, "name": "both", "subjects": [fox, penguin]})
    assert RunFolder(both).finished() == {"fox": End(8, 4, 2), "penguin": End(12, 12)}
    assert result(both).read_bytes() == copy_of(both, 4).read_bytes()
    assert result(both, "penguin").read_bytes() == copy_of(both, 12, "penguin").read_bytes()
    for subject in (fox, penguin):
        name = subject["name"]
        alone = train_here({**tree, "name": name, "subjects": [subject]})
        assert RunFolder(alone).finished() == {name: RunFolder(both).finished()[name]}
        packed, solo = read_tensors(result(both, name)), read_tensors(result(alone, name))
        assert all(torch.allclose(packed[k], solo[k], rtol=1e-4, atol=1e-4) for k in solo)
        assert scored(both, name)["readings"] == scored(alone, name)["readings"]
    tree["train"]["early_stop"] = False
    plain = train_here({**tree, "name": "plain", "subjects": [fox, penguin]})
    ours, theirs = (weights_of(run, 12, "penguin") for run in (both, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class Killed(BaseException):
    """The process is gone."""


def kill_at_each(patch: pytest.MonkeyPatch) -> None:
    """Killed once wherever something else is on disk: when a state is scored and not saved, saved
    and not copied, and before and after a subject is marked."""
    survived: set[tuple[str, int]] = set()

    def mortal(kind: str, step: int) -> None:
        if (kind, step) not in survived:
            survived.add((kind, step))
            raise Killed(kind, step)

    add, write = History.add, work_module.write_checkpoint
    mark = Run.mark_finished

    def scoring(self: History, step: int, scores: Scores, *, held_out: bool) -> None:
        add(self, step, scores, held_out=held_out)
        mortal("scored", step)

    def writing(folder: Path, step: int, *rest: Any, **named: Any) -> Any:
        path = write(folder, step, *rest, **named)
        mortal("saved", step)
        return path

    def marking(self: Run, done: list[Slot]) -> None:
        mortal("not marked", done[0].step)
        mark(self, done)
        mortal("marked", done[0].step)

    patch.setattr(History, "add", scoring)
    patch.setattr(work_module, "write_checkpoint", writing)
    patch.setattr(Run, "mark_finished", marking)


def test_killed_at_every_place_it_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, {"fox": RISE_AND_FALL})
    whole = train_here(early_config("textual_inversion", tmp_path / "whole"))
    tree = early_config("textual_inversion", tmp_path / "killed")
    deaths = 0
    with monkeypatch.context() as patch:
        kill_at_each(patch)
        while True:
            try:
                run = train_here(tree)
                break
            except Killed:
                deaths += 1
                assert deaths < 40
    assert deaths == 4 + 4 + 2
    assert RunFolder(run).finished() == RunFolder(whole).finished() == {"fox": End(8, 4, 2)}
    assert scored(run) == scored(whole)
    assert steps_of(run) == steps_of(whole)
    for path in (result(whole), *(whole / "subjects/fox").rglob("trainables.safetensors")):
        assert sha256_file(run / path.relative_to(whole)) == sha256_file(path)


def test_a_best_state_that_is_gone_is_not_a_dead_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def damage(slot: Slot) -> None:
        if slot.step == 8:
            (tmp_path / "lora/subjects/fox/checkpoints/step-00000004/state.json").unlink()

    plant(monkeypatch, {"fox": RISE_AND_FALL}, damage)
    run = train_here(early_config("lora", tmp_path))
    assert "the result of fox is its last state" in capsys.readouterr().out
    assert RunFolder(run).finished() == {"fox": End(8, 8, 2)}
    assert result(run).read_bytes() == copy_of(run, 8).read_bytes()


def test_scores_by_another_yardstick_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from disttrain.engine.examiner import Examiner

    plant(monkeypatch, {"fox": RISE_AND_FALL})
    tree = early_config("textual_inversion", tmp_path)
    train_here(tree)
    monkeypatch.setattr(Examiner, "know", lambda self, member: "other")
    tree["train"]["early_stop_patience"] = 9
    run = train_here(tree)
    assert "earlier states were not scored, or by other pictures" in capsys.readouterr().out
    assert [reading["step"] for reading in scored(run)["readings"]] == [8, 10, 12]
    assert RunFolder(run).finished() == {"fox": End(12, 8, 2)}


def test_in_a_fleet_the_next_subject_takes_the_slot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught: list[tuple[str, int]] = []
    curves = {"s0": RISE_AND_FALL, "s1": RISE, "s2": RISE_AND_FALL}
    plant(monkeypatch, curves, lambda slot: taught.append((slot.name, slot.step)))
    rows = [{**PENGUIN, "name": name, "class_name": "penguin"} for name in curves]
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump(rows))
    tree = early_config("lora", tmp_path)
    tree["fleet"] = {"pack_size": 2}
    members = read_manifest(tmp_path / "rows.yaml", tree)

    def start() -> int:
        try:
            return train_fleet(members)
        finally:
            forget_accelerate()

    assert start() == 0
    run = members[0].folder
    ends = {name: FleetFolder(run).read(name).end for name in curves}
    assert ends == {"s0": End(8, 4, 2), "s1": End(12, 12), "s2": End(8, 4, 2)}
    assert taught.index(("s2", 2)) < taught.index(("s1", 12)), "it did not wait for s1"
    assert result(run, "s2").read_bytes() == copy_of(run, 4, "s2").read_bytes()
    before = len(taught)
    assert start() == 0
    assert len(taught) == before, "all are known as finished"
    worker = type("Claims", (), {"owners": lambda self: {}})()
    (line, *_), last = (lines := status_lines(FleetFolder(run), worker)), lines[-1]
    assert "finished" in line
    assert "8/12" in line
    assert "result of step 4" in line
    assert last == "3 finished"


# Real scores.


@pytest.mark.parametrize("method", ["lora", "textual_inversion", "dreambooth"])
def test_scores_in_training_are_those_of_the_command(method: str, tmp_path: Path) -> None:
    """What a pack of two draws of each, and of the base, against saved states put into a base."""
    tree = early_config(method, tmp_path, max_steps=4, early_stop_patience=9, keep_checkpoints=9)
    tree["optim"]["learning_rate"] *= 100
    tree["score"]["steps"] = 8
    if method != "dreambooth":
        token = "<olis>" if method == "textual_inversion" else "olis"
        tree["subjects"].append({**tree["subjects"][0], **PENGUIN, "token": token})
        tree["subjects"][1]["held_out"] = "examples/held_out/penguin"
    run = train_here(tree)
    for member in members_of(run, ""):
        name = member.subjects[0].name
        ours = scored(run, name)["readings"]
        theirs = score_subject(run, member, Bench(member, ScoreRequest())).readings
        assert [reading["step"] for reading in ours] == [2, 4]
        by_step = {reading.step: reading.scores for reading in theirs}
        for reading in ours:
            if reading["step"] in by_step:
                expected = by_step[reading["step"]]
                for key in ("subject", "subject_error", "diversity", "drift", "relative_strength"):
                    value = getattr(expected, key)
                    known = None if value is None else pytest.approx(value, abs=3e-3)
                    assert reading["scores"][key] == known, f"{name} {reading['step']} {key}"
        assert len(by_step) == 2
        assert (ours[-1]["scores"]["drift"] > 0.02) == (method != "textual_inversion")
    tree["train"]["early_stop"] = False
    plain = train_here({**tree, "name": "plain"})
    for subject in tree["subjects"]:
        left, right = (weights_of(one, 4, subject["name"]) for one in (run, plain))
        assert all(torch.equal(left[name], right[name]) for name in right), "scoring changed it"


def test_a_newcomer_to_a_pack_is_compared_with_the_untouched_base(tmp_path: Path) -> None:
    """Its slot's neighbour has learned by then; what the base draws must not show that."""
    import yaml

    steps = {"s0": 2, "s1": 6, "s2": 4}
    rows = [
        {**PENGUIN, "name": name, "class_name": "penguin", "train.max_steps": count}
        for name, count in steps.items()
    ]
    for row in rows:
        row["held_out"] = "examples/held_out/penguin"
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump(rows))
    tree = early_config("lora", tmp_path, checkpoint_every=1, early_stop_patience=99)
    tree["optim"]["learning_rate"] = 0.1
    tree["score"]["steps"] = 8
    tree["fleet"] = {"pack_size": 2}
    members = read_manifest(tmp_path / "rows.yaml", tree)
    try:
        assert train_fleet(members) == 0
    finally:
        forget_accelerate()
    run = members[0].folder
    theirs = score_subject(run, members[2], Bench(members[2], ScoreRequest())).readings
    expected = {reading.step: reading.scores.drift for reading in theirs}
    ours = {r["step"]: r["scores"]["drift"] for r in scored(run, "s2")["readings"]}
    assert list(ours) == [1, 2, 3, 4]
    assert expected[4] > 0.02
    for step, drift in expected.items():
        assert ours[step] == pytest.approx(drift, abs=3e-3)


def test_features_that_cannot_be_had_fail_their_row_of_a_fleet_alone(tmp_path: Path) -> None:
    tree = early_config("lora", tmp_path, max_steps=4)
    row = {"images": "examples/subjects/fox", "class_name": "animal face", "token": "sks"}
    manifest = tmp_path / "fleet.yaml"
    rows = [{"name": "one", **row, "score.features": "no/where"}, {"name": "two", **row}]
    manifest.write_text(yaml.safe_dump(rows))
    members = read_manifest(manifest, tree)
    # The first row is what a fleet checks before it begins; here it is one that can be had.
    try:
        assert train_fleet(members[::-1]) == 1
    finally:
        forget_accelerate()
    fleet = FleetFolder(members[0].folder)
    assert fleet.read("two").status == "finished"
    failed = fleet.read("one")
    assert (failed.status, failed.steps) == ("failed", 0)
    assert "no/where" in failed.reason
