"""`disttrain score` on real small runs: every state, the file it leaves, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import METHODS, checkpoints
from test_features import small_models

from disttrain.cli import main
from disttrain.config import RunConfig
from disttrain.config_file import load_config
from disttrain.data.images import decode
from disttrain.engine import compared_pictures as compared_module
from disttrain.engine.artist import Artist
from disttrain.engine.compared_pictures import Against
from disttrain.engine.prompt_judge import PromptJudge
from disttrain.files import read_tensors, write_tensors
from disttrain.models.base import configured_base, load_base
from disttrain.models.sampler import DrawSettings
from disttrain.models.text import PromptTokenizer
from disttrain.review import score as score_module
from disttrain.review.score import Bench, ScoreRequest, members_of, score_subject
from disttrain.review.states import put, saved_states, take_out

CPU = torch.device("cpu")
HELD_OUT = "examples/held_out/fox"


class Copies:
    """Finished runs by method, copied when asked for, with few and quick pictures to score."""

    def __init__(self, trained: dict[str, Path], folder: Path) -> None:
        self.trained, self.folder = trained, folder

    def __getitem__(self, method: str) -> Path:
        run = self.folder / method
        if not run.exists():
            left = shutil.ignore_patterns("optimizer.safetensors")
            shutil.copytree(self.trained[method], run, ignore=left)
            change(run, held_out=HELD_OUT, pictures=2, steps=2)
        return run


@pytest.fixture
def runs(trained: dict[str, Path], tmp_path: Path) -> Copies:
    """The shared finished runs, as copies that a test may change."""
    return Copies(trained, tmp_path)


def change(run: Path, held_out: str = "", **score: Any) -> None:
    """Change what a run says of scores."""
    path = run / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["subjects"][0]["held_out"] = held_out
    tree["score"].update(score)
    path.write_text(yaml.safe_dump(tree))


def scored(run: Path, *options: str) -> dict[str, Any]:
    assert main(["score", str(run), *options]) == 0
    return json.loads((run / "subjects/fox/scores.json").read_text())


def files_of(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}


@pytest.mark.parametrize("method", METHODS)
def test_every_state_is_scored_and_one_is_picked(
    method: str, runs: Copies, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs[method]
    before = files_of(run)
    found = scored(run)
    result = "model" if method == "dreambooth" else "fox.safetensors"
    earlier = (
        "checkpoints/step-00000003" if method == "dreambooth" else "steps/fox-00000003.safetensors"
    )
    states = found["states"]
    assert [(state["step"], state["file"]) for state in states] == [(3, earlier), (6, result)]
    assert found["picked"] in (3, 6)
    assert found["features"] == "EffNet-I"
    against = found["compared_with"]
    assert (against["held_out"], against["place"], against["pictures"]) == (True, HELD_OUT, 3)
    assert (found["pictures"], found["steps"], found["size"]) == (2, 2, 64)
    drifts = [state["drift"] for state in states]
    if method == "textual_inversion":
        assert drifts == [0.0, 0.0]
        assert all(0 < s["strength"] < 0.1 and s["relative_strength"] > 1 for s in states)
    else:
        assert 0 < drifts[0] < drifts[1]
        assert [state["strength"] for state in states] == [None, None]
    assert found["before"]["drift"] == 0.0
    assert all(-1 < state["subject"] < 1 and state["subject_error"] > 0 for state in states)
    after = files_of(run)
    del after["subjects/fox/scores.json"]
    grid = decode(after.pop("subjects/fox/scores.png"), "scores.png").pixels
    assert grid.shape[0] == 4 * (128 + 2) - 2, "subject, before, two states"
    assert after == before, "nothing else was touched"
    shown = capsys.readouterr().out
    assert f"fox: EffNet-I to 3 pictures kept out of training ({HELD_OUT})" in shown
    (picked,) = [
        line
        for line in shown.splitlines()
        if line.split()[:1] == ["picked"] and line.split()[1].isdecimal()
    ]
    assert int(picked.split()[1]) == found["picked"]
    best = next(state for state in states if state["step"] == found["picked"])
    assert f"{found['before']['subject']:.3f} before, {best['subject']:.3f} after" in shown


@pytest.mark.slow
def test_the_same_run_gives_the_same_numbers(runs: Copies) -> None:
    quick = ("--pictures", "1", "--steps", "1")
    first = scored(runs["lora"], *quick)
    assert scored(runs["lora"], *quick) == first
    other = scored(runs["lora"], *quick, "--seed", "7")
    assert (first["seed"], other["seed"]) == (0, 7)
    assert other["before"]["subject"] != first["before"]["subject"]


def test_without_held_out_pictures_it_says_so(
    runs: Copies, capsys: pytest.CaptureFixture[str]
) -> None:
    change(runs["textual_inversion"], pictures=1, steps=1)
    found = scored(runs["textual_inversion"])
    assert found["compared_with"]["held_out"] is False
    assert found["compared_with"]["pictures"] == 10
    shown = capsys.readouterr().out
    assert "10 pictures from the training set (" in shown
    assert "give --held-out FOLDER to tell learning from copying" in shown


def test_held_out_pictures_may_be_named_afterwards(runs: Copies) -> None:
    run = runs["textual_inversion"]
    change(run, pictures=1, steps=1)
    against = scored(run, "--held-out", HELD_OUT)["compared_with"]
    assert (against["held_out"], against["place"]) == (True, HELD_OUT)


def test_held_out_pictures_are_one_subjects(
    runs: Copies, capsys: pytest.CaptureFixture[str]
) -> None:
    path = runs["lora"] / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["subjects"].append({**tree["subjects"][0], "name": "owl"})
    path.write_text(yaml.safe_dump(tree))
    assert main(["score", str(runs["lora"]), "--held-out", HELD_OUT]) == 2
    assert "--held-out: the run has several subjects" in capsys.readouterr().err


def test_a_subject_without_states_is_passed_over_beside_one_with_some(
    runs: Copies, capsys: pytest.CaptureFixture[str]
) -> None:
    path = runs["lora"] / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["subjects"].insert(0, {**tree["subjects"][0], "name": "owl"})
    path.write_text(yaml.safe_dump(tree))
    scored(runs["lora"], "--pictures", "1", "--steps", "1")
    assert "passed over owl: " in capsys.readouterr().err


def test_clip_and_dino_are_reported_beside(
    runs: Copies, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = small_models(tmp_path / "models")
    quick = ["--pictures", "1", "--steps", "1"]
    clip, dino = str(models["clip"]), str(models["dino"])
    found = scored(runs["lora"], *quick, "--clip", clip, "--dino", dino)
    assert found["features"] == "EffNet-I"
    for scores in (found["before"], *found["states"]):
        assert scores["others"].keys() == {"CLIP-I", "CLIP-T", "DINO"}
        assert all(-1 <= value <= 1 for value in scores["others"].values())
    header = capsys.readouterr().out.splitlines()[1]
    assert header.split()[-3:] == ["CLIP-I", "CLIP-T", "DINO"]


def test_options_go_before_settings_and_progress_goes_to_standard_error(
    runs: Copies,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(score_module, "SILENT_SECONDS", -1.0)
    found = scored(runs["textual_inversion"], "--pictures", "1", "--steps", "1")
    assert (found["pictures"], found["steps"]) == (1, 1)
    assert found["before"]["diversity"] is None
    assert "fox: step 6 (2 of 2)" in capsys.readouterr().err


@pytest.mark.parametrize("method", [pytest.param("lora", marks=pytest.mark.slow), "dreambooth"])
def test_the_judge_is_the_untouched_base(
    method: str, runs: Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a state is in place, and after all were."""
    run = runs[method]
    change(run, pictures=1, steps=1)
    (member,) = members_of(run, "")
    bench = Bench(member, ScoreRequest())
    fresh = configured_base(member).unet.state_dict()
    judged: list[bool] = []
    gains = PromptJudge.gains

    def watched(self: PromptJudge, *arguments: Any) -> np.ndarray:
        weights = self.denoiser.unet.state_dict()
        same = weights.keys() == fresh.keys()
        judged.append(same and all(torch.equal(weights[name], fresh[name]) for name in fresh))
        return gains(self, *arguments)

    monkeypatch.setattr(PromptJudge, "gains", watched)
    score_subject(run, member, bench)
    assert judged == [True, True, True]


def drawn(config: RunConfig, base: Any, tokenizer: PromptTokenizer) -> np.ndarray:
    settings = DrawSettings(2, 7.5, 64, 64)
    word = config.subjects[0].token
    artist = Artist(base, tokenizer, word, settings, CPU)
    return artist.draw([f"a photo of {word}"], [0]).latents.numpy()


@pytest.mark.parametrize("method", METHODS)
def test_a_state_is_put_in_whatever_was_there_before(method: str, runs: Copies) -> None:
    """And the newest checkpoint of a model that was trained whole draws what its result draws."""
    run = runs[method]
    config = load_config(run / "config.yaml")
    base = configured_base(config)
    untouched = drawn(config, base, PromptTokenizer(base.tokenizer))
    first, last = saved_states(config, run / "subjects/fox", 6)
    pictures = [
        drawn(config, base, put(config, base, state).tokenizer) for state in (first, last, first)
    ]
    assert np.array_equal(pictures[0], pictures[2])
    assert not np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], untouched)
    if config.packable:
        take_out(base)
        assert np.array_equal(drawn(config, base, PromptTokenizer(base.tokenizer)), untouched)
        return
    (_, kept) = saved_states(config, run / "subjects/fox", None)
    assert kept.path == checkpoints(run)[-1]
    assert np.array_equal(drawn(config, base, put(config, base, kept).tokenizer), pictures[1])


def test_where_there_is_an_average_it_is_what_is_scored(runs: Copies) -> None:
    run = runs["dreambooth"]
    config = load_config(run / "config.yaml")
    path = checkpoints(run)[-1]
    weights = read_tensors(path / "trainables.safetensors")
    name = "unet.conv_in.weight"
    write_tensors(path / "average.safetensors", {**weights, name: weights[name] + 1})
    base = configured_base(config)
    put(config, base, saved_states(config, run / "subjects/fox", None)[-1])
    assert torch.equal(base.unet.state_dict()["conv_in.weight"], weights[name] + 1)


def test_a_damaged_state_is_passed_over_and_named(
    runs: Copies, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs["lora"]
    damaged = run / "subjects/fox/steps/fox-00000003.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    found = scored(run, "--pictures", "1", "--steps", "1")
    assert [state["step"] for state in found["states"]] == [6]
    assert "fox-00000003.safetensors" in found["passed_over"][0]
    assert "passed over: " in capsys.readouterr().err


def test_losses_of_the_steps_before_a_state_are_averaged(
    runs: Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("disttrain.engine.overtraining.FEWEST_LOSSES", 3)
    run = runs["textual_inversion"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = scored(run, "--pictures", "1", "--steps", "1")
    losses = [state["loss"] for state in found["states"]]
    expected = [np.mean([row["loss"] for row in rows[i : i + 3]]) for i in (0, 3)]
    assert losses == pytest.approx(expected)


def test_a_fleets_subjects_are_found_by_their_own_settings(
    runs: Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fleet has no config.yaml of its own but one for each subject."""
    monkeypatch.setattr("disttrain.engine.overtraining.FEWEST_LOSSES", 3)
    run = runs["lora"]
    shutil.move(run / "config.yaml", run / "subjects/fox/config.yaml")
    shutil.move(run / "metrics.jsonl", run / "subjects/fox/metrics.jsonl")
    (member,) = members_of(run, "")
    assert member.subjects[0].name == "fox"
    found = scored(run, "--pictures", "1", "--steps", "1")
    assert [state["step"] for state in found["states"]] == [3, 6]
    assert all(state["loss"] > 0 for state in found["states"])


def test_large_sets_are_compared_with_some_of_them(
    runs: Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compared_module, "MOST_COMPARED", 4)
    change(runs["lora"])
    against, pictures = compared_module.compared_pictures(load_config(runs["lora"] / "config.yaml"))
    assert isinstance(against, Against)
    assert pictures.shape == (4, 64, 64, 3)
    assert pictures.dtype == np.uint8


def test_pictures_are_compared_as_the_base_keeps_them(runs: Copies) -> None:
    """What its autoencoder loses cannot be learned; the setting says whether that counts."""
    run = runs["lora"]
    change(run, pictures=1, steps=1)
    kept = scored(run)
    change(run, through_autoencoder=False)
    true = scored(run)
    change(run, through_autoencoder=True)
    (member,) = members_of(run, "")
    bench = Bench(member, ScoreRequest())
    # What is only reported is compared with the pictures themselves.
    bench.others.append(bench.main)
    beside = score_subject(run, member, bench).before.others["EffNet-I"]
    assert beside == pytest.approx(true["before"]["subject"], abs=1e-6)
    assert (kept["through_autoencoder"], true["through_autoencoder"]) == (True, False)
    assert abs(kept["before"]["subject"] - true["before"]["subject"]) > 0.01
    _, pictures = compared_module.compared_pictures(member)
    vae = load_base("tiny").load_vae()
    as_they_are = replace(member, score=replace(member.score, through_autoencoder=False))
    assert compared_module.as_base_keeps(as_they_are, pictures, vae) is pictures
    found = compared_module.as_base_keeps(member, pictures, vae)
    with torch.no_grad():
        pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
        stock = vae(pixels).sample.permute(0, 2, 3, 1).clamp(-1, 1).numpy() * 127.5 + 127.5
    assert found.dtype == np.uint8
    assert np.abs(found - stock).max() < 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent"], "absent: no run folder (config.yaml is not in it)"),
        (["RUN", "--subject", "owl"], "--subject: owl is not in this run; it has fox"),
        (["RUN", "--pictures", "0"], "--pictures: 0 is impossible"),
        (["RUN", "--steps", "0"], "--steps: 0 is impossible"),
        (["RUN", "--seed", "-1"], "--seed: -1 is impossible"),
        (["RUN", "--held-out", "no/where"], "no/where: no such folder or index"),
        (["RUN", "--features", "no/where"], "score.features: 'no/where'"),
        (["RUN", "--clip", "no/where"], "score.features: 'no/where'"),
        (["EMPTY"], "subjects/fox: no saved state yet; train the run to its first checkpoint"),
    ],
)
def test_refusals_are_one_line(
    words: list[str],
    message: str,
    runs: Copies,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = runs["lora"]
    if words[0] == "EMPTY":
        shutil.rmtree(run / "subjects/fox")
    named = [str(run) if word in ("RUN", "EMPTY") else word for word in words]
    assert main(["score", *named]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err
    assert shown.err.splitlines()[-1].startswith("disttrain: ")
    assert not (run / "subjects/fox/scores.json").exists()
