"""The numbers themselves: formulas against plain arithmetic, and what each may depend on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_config

from disttrain import randomness
from disttrain.config_file import parse_config
from disttrain.engine.artist import Artist, Drawn
from disttrain.engine.prompt_judge import DRAWS, PromptJudge
from disttrain.engine.score_prompts import ScorePrompts, score_prompts, without_token
from disttrain.engine.scores import (
    Compared,
    Yardstick,
    apart,
    diversity,
    draw_each,
    fidelity,
    measure,
    strength,
)
from disttrain.errors import ConfigError
from disttrain.models.base import BaseModel, load_base
from disttrain.models.sampler import DrawSettings
from disttrain.models.text import PromptTokenizer, encode_ids

CPU = torch.device("cpu")


def unit(*rows: Sequence[float]) -> np.ndarray:
    found = np.array(rows, dtype=np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_fidelity_is_a_mean_cosine_with_the_error_over_drawn_pictures() -> None:
    drawn, wanted = unit((1, 0), (0, 1), (1, 1)), unit((1, 0), (1, 0))
    mean, error = fidelity(drawn, wanted)
    each = [1.0, 0.0, 0.5**0.5]
    assert mean == pytest.approx(np.mean(each), abs=1e-6)
    assert error == pytest.approx(np.std(each, ddof=1) / 3**0.5, abs=1e-6)
    assert fidelity(drawn[:1], wanted)[1] == 0.0


def test_diversity_is_over_pairs_of_one_prompt() -> None:
    features = unit((1, 0), (1, 0), (0, 1), (1, 1))
    assert diversity(features, 2) == pytest.approx((0 + (1 - 0.5**0.5)) / 2, abs=1e-6)
    pairs = [0, 1, 1 - 0.5**0.5, 1, 1 - 0.5**0.5, 1 - 0.5**0.5]
    assert diversity(features, 4) == pytest.approx(np.mean(pairs), abs=1e-6)
    assert diversity(features, 1) is None


def test_apart_compares_rows_of_one_number() -> None:
    assert apart(unit((1, 0), (0, 1)), unit((1, 0), (1, 0))) == pytest.approx(0.5)


def test_strength_is_a_mean_absolute_value() -> None:
    assert strength(torch.tensor([[1.0, -3.0], [0.0, 2.0]])) == pytest.approx(1.5)


class NumberEncoder:
    """A picture's first pixel as an angle in degrees."""

    name, text_name = "Numbers", "Texts"

    def encode(self, pictures: np.ndarray) -> np.ndarray:
        angles = np.radians(pictures[:, 0, 0, 0].astype(float))
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        return unit(*[(1, 0) if "fox" in text else (0, 1) for text in texts])


class Hand:
    """Draws a number for each prompt and seed, and remembers what was asked."""

    def __init__(self, angles: dict[str, int]) -> None:
        self.angles = angles
        self.asked: list[tuple[str, int]] = []

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Drawn:
        self.asked += zip(prompts, seeds, strict=True)
        values = [self.angles[p] + s for p, s in zip(prompts, seeds, strict=True)]
        pictures = np.array(values, np.uint8).reshape(-1, 1, 1, 1).repeat(3, axis=3)
        return Drawn(pictures, torch.zeros(len(values), 1))


def yardstick(**other: Any) -> Yardstick:
    prompts = ScorePrompts(("my sks fox",), ("my fox",), ("my fox",), ("a boat",))
    encoder = NumberEncoder()
    untouched = encoder.encode(np.array([[[[30] * 3]], [[[31] * 3]]], np.uint8))
    wanted = Compared(encoder, unit((1, 0)))
    return Yardstick(prompts, 2, 0, wanted, untouched, **other)


def cosine(degrees: float) -> float:
    return float(np.cos(np.radians(degrees)))


def test_measure_puts_the_numbers_together() -> None:
    hand = Hand({"my sks fox": 10, "a boat": 40})
    found, _ = measure(yardstick(), hand)
    assert hand.asked == [("my sks fox", 0), ("my sks fox", 1), ("a boat", 0), ("a boat", 1)]
    assert found.subject == pytest.approx((cosine(10) + cosine(11)) / 2, abs=1e-5)
    assert found.diversity == pytest.approx(1 - cosine(1), abs=1e-5)
    assert found.drift == pytest.approx(1 - cosine(10), abs=1e-5)
    assert (found.prompt, found.strength, found.relative_strength) == (None, None, None)


def test_the_base_draws_without_the_token_and_without_drift() -> None:
    hand = Hand({"my fox": 20})
    found, _ = measure(yardstick(), hand, plain=True, sanity=False)
    assert hand.asked == [("my fox", 0), ("my fox", 1)]
    assert found.drift == 0.0


def test_strength_is_told_beside_the_vocabularys() -> None:
    hand = Hand({"my sks fox": 10})
    vectors, vocabulary = torch.full((2, 3), -0.4), torch.full((9, 3), 0.1)
    found, _ = measure(
        yardstick(),
        hand,
        sanity=False,
        vectors=vectors,
        vocabulary=vocabulary,
    )
    assert found.strength == pytest.approx(0.4)
    assert found.relative_strength == pytest.approx(4.0)


def test_other_encoders_are_reported_beside_with_their_text_side() -> None:
    hand = Hand({"my sks fox": 10, "a boat": 40})
    other = Compared(NumberEncoder(), unit((0, 1)))
    found, _ = measure(yardstick(others=(other,)), hand)
    assert found.others.keys() == {"Numbers", "Texts"}
    assert found.others["Numbers"] == pytest.approx((cosine(80) + cosine(79)) / 2, abs=1e-5)
    assert found.others["Texts"] == pytest.approx((cosine(10) + cosine(11)) / 2, abs=1e-5)


# The base model as judge.


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def base(request: pytest.FixtureRequest) -> BaseModel:
    return load_base("tiny", prediction_type=request.param)


def latents(count: int) -> torch.Tensor:
    return torch.from_numpy(randomness.normal((count, 8, 8, 8), 1, ("test", "latents")))


def test_the_judges_gain_is_the_relative_drop_of_the_denoising_error(base: BaseModel) -> None:
    """Recomputed with the scheduler's own noising and a plain call of the UNet."""
    tokenizer = PromptTokenizer(base.tokenizer)
    (latent,) = latents(1)

    def error(text: str, draw: int) -> float:
        timestep = torch.tensor([int((draw + 0.5) / DRAWS * 1000)])
        noise = torch.from_numpy(randomness.normal((8, 8, 8), 0, ("prompt judge", "noise"), draw))[
            None
        ]
        noisy = base.scheduler.add_noise(latent[None], noise, timestep)
        with torch.no_grad():
            context = encode_ids(base.text_encoder, tokenizer.ids(text)[None])
            predicted = base.unet(noisy, timestep, context).sample
        velocity = base.scheduler.config["prediction_type"] == "v_prediction"
        wanted = base.scheduler.get_velocity(latent[None], noise, timestep) if velocity else noise
        return float((predicted - wanted).pow(2).mean())

    drops = [1 - error("a fox", draw) / error("", draw) for draw in range(DRAWS)]
    gain = PromptJudge(base, CPU).gains(latent[None], ["a fox"])
    assert gain == pytest.approx([np.mean(drops)], abs=1e-4)


def test_no_prompt_is_no_help_and_pictures_are_judged_alone(base: BaseModel) -> None:
    judge = PromptJudge(base, CPU)
    two = latents(2)
    both = judge.gains(two, ["a fox", "a fox"])
    assert judge.gains(two, ["", ""]) == pytest.approx([0, 0], abs=1e-6)
    assert judge.gains(two[1:], ["a fox"]) == pytest.approx(both[1:], abs=1e-6)
    assert both[0] != pytest.approx(both[1], abs=1e-6)


def test_the_judge_prefers_the_prompt_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base that was taught that `fox` means one latent finds it in that one and in no other."""
    base = load_base("tiny", prediction_type="epsilon")
    first, second = latents(2)
    judge = PromptJudge(base, CPU)
    fox, plain = (judge.contexts.get([text])[0] for text in ("a fox", ""))
    kept = base.scheduler.alphas_cumprod

    def forward(noisy: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, **_: Any):
        share = kept[timesteps].view(-1, 1, 1, 1)
        told = torch.stack([torch.equal(row, fox) * first for row in context])
        return ((noisy - share.sqrt() * told) / (1 - share).sqrt(),)

    assert not torch.equal(fox, plain)
    monkeypatch.setattr(base.unet, "forward", forward)
    right, wrong = judge.gains(torch.stack([first, second]), ["a fox", "a fox"])
    assert right > 0.99
    assert wrong < 0


# What is drawn.


@pytest.mark.parametrize(
    ("text", "token", "name", "expected"),
    [
        ("a photo of sks fox", "sks", "fox", "a photo of fox"),
        ("a photo of SKS fox", "sks", "fox", "a photo of fox"),
        ("a photo of <fox>", "<fox>", "animal", "a photo of animal"),
        ("sks in the snow", "sks", "fox", "fox in the snow"),
        ("sks foxes", "sks", "fox", "fox foxes"),
        ("the masks of sks", "sks", "fox", "the masks of fox"),
        ("the skster of sks", "sks", "fox", "the skster of fox"),
        ("a photo of <fox> today", "<fox>", "", "a photo of today"),
        ("a photo of a fox", "", "fox", "a photo of a fox"),
    ],
)
def test_the_token_is_left_out(text: str, token: str, name: str, expected: str) -> None:
    from disttrain.config import SubjectSettings

    assert without_token(text, SubjectSettings("a", "b", token, name)) == expected


def test_usual_prompts_follow_the_method(tmp_path: Path) -> None:
    lora = small_config("lora", tmp_path)
    found = score_prompts(*_one(lora))
    assert found == ScorePrompts(
        ("a photo of sks fox",), ("a photo of fox",), ("a photo of fox",), ("a photo of fox",)
    )
    lora["subjects"][0]["instance_prompt"] = "{token} {class_name} on grass"
    assert score_prompts(*_one(lora)).subject == ("sks fox on grass",)
    lora["subjects"][0]["instance_prompt"] = "{token} {class_name}, {caption}"
    assert score_prompts(*_one(lora)).subject == ("a photo of sks fox",)
    lora["score"] = {"prompts": ["{token} at sea"], "sanity_prompts": ["a boat"]}
    found = score_prompts(*_one(lora))
    assert (found.subject, found.plain, found.sanity) == (
        ("sks at sea",),
        ("fox at sea",),
        ("a boat",),
    )
    inverted = small_config("textual_inversion", tmp_path)
    inverted["subjects"][0]["class_name"] = ""
    found = score_prompts(*_one(inverted))
    assert (found.subject, found.told) == (("a photo of <fox>",), ("",))
    assert found.sanity == ("a photo",)


def test_fine_tuning_has_no_usual_prompt(tmp_path: Path) -> None:
    tree = small_config("lora", tmp_path)
    tree["method"] = {"name": "finetune"}
    tree["subjects"][0].update(token="", class_name="")
    with pytest.raises(ConfigError, match=r"score\.prompts: empty"):
        score_prompts(*_one(tree))
    tree["score"] = {"prompts": ["a fox"]}
    found = score_prompts(*_one(tree))
    assert found.subject == found.plain == found.told == ("a fox",)


def test_settings_of_scores_are_no_settings_of_training(tmp_path: Path) -> None:
    """They may change while a run goes on, and checkpoints from before there were any go on."""
    from disttrain import schema
    from disttrain.engine.run_folder import MAY_CHANGE, RunFolder, check_same_run
    from disttrain.engine.run_folder import write_config as keep
    from disttrain.engine.settings_keys import pack_key, settings_key, training_key
    from disttrain.files import digest_of

    tree = small_config("lora", tmp_path)
    old = parse_config(tree)
    keep(RunFolder(old.folder), old)
    tree["score"] = {"pictures": 3, "prompts": ["a {token}"], "features": "some/model"}
    tree["subjects"][0]["held_out"] = "examples/held_out/fox"
    new = parse_config(tree)
    check_same_run(RunFolder(old.folder), new)
    for key in (pack_key, settings_key, training_key):
        assert key(old) == key(new), key.__name__
    flat = schema.flatten(schema.to_mapping(old))
    known = {k: v for k, v in flat.items() if not k.startswith("score.") and "held_out" not in k}
    places = ("subjects.0.images", "subjects.0.class_images")
    earlier = {k: v for k, v in known.items() if not k.startswith((*MAY_CHANGE, *places))}
    assert training_key(new) == digest_of(earlier)


def test_held_out_pictures_are_found_beside_a_manifest(tmp_path: Path) -> None:
    from disttrain.manifest import read_manifest

    tree = small_config("lora", tmp_path / "runs")
    for name in ("fox", "kept"):
        (tmp_path / "set" / name).mkdir(parents=True)
    table = tmp_path / "set/fleet.csv"
    table.write_text("name,images,held_out\nfox,fox,kept\n")
    (member,) = read_manifest(table, tree)
    assert member.subjects[0].held_out == str(tmp_path / "set/kept")


def _one(tree: dict[str, Any]) -> tuple[Any, Any]:
    config = parse_config(tree)
    return config, config.subjects[0]


def test_a_picture_is_its_prompts_and_seeds_own(base: BaseModel) -> None:
    artist = Artist(base, PromptTokenizer(base.tokenizer), "", DrawSettings(2, 7.5, 64, 64), CPU)
    several = draw_each(artist, ["a fox", "a boat"], 3, seed=5)  # more than at once
    assert several.pictures.shape == (6, 64, 64, 3)
    alone = artist.draw(["a boat"], [7])
    assert torch.allclose(several.latents[5], alone.latents[0], atol=1e-4)
    assert np.abs(several.pictures[5].astype(int) - alone.pictures[0]).max() <= 1
    assert not torch.allclose(several.latents[4], several.latents[5], atol=1e-2)
    assert not torch.allclose(several.latents[2], several.latents[5], atol=1e-4)
