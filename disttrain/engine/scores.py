"""How well one state of a model has learned a subject, in a few numbers.

Between an `Artist`, which draws, and the verdict over all states (`overtraining.py`). Invariant:
`measure` is a function of the model's state and the yardstick alone: seeds, prompts, timesteps and
noise are fixed, so the states of a run differ by what they learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

from disttrain.engine.artist import Drawn, each_with_each
from disttrain.engine.prompt_judge import PromptJudge
from disttrain.engine.score_prompts import ScorePrompts
from disttrain.models.features import FeatureEncoder, TextEncoder


@dataclass(frozen=True)
class Scores:
    """One state's numbers.

    `subject`: mean cosine of pictures of the subject to the pictures it is compared with, and
    `subject_error`, the standard error of that mean over the drawn pictures. `diversity`: mean of
    1 - cosine over pairs of pictures of one prompt; None for one picture a prompt. `drift`: mean of
    1 - cosine between what the base and this state draw for prompts without the subject. `prompt`:
    see `PromptJudge.gains`; None where the prompt without the token says nothing. `strength`: mean
    absolute value of textual inversion's vectors, and `relative_strength`, that by the mean over
    the base's vocabulary; None for other methods. `others`: CLIP-I, CLIP-T, DINO where asked for.
    """

    subject: float
    subject_error: float
    diversity: float | None
    drift: float
    prompt: float | None = None
    strength: float | None = None
    relative_strength: float | None = None
    others: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Compared:
    """Pictures of the subject as one encoder sees them: features `[M, D]` of length 1."""

    encoder: FeatureEncoder
    wanted: np.ndarray


@dataclass(frozen=True)
class Yardstick:
    """What every state of a subject is measured against.

    Args:
        main: decides; `others` are reported beside it.
        untouched: features, by the main encoder, of what the base draws for the sanity prompts.
        judge: None leaves prompt fidelity out.
        pictures: drawn for each prompt, with the seeds from `seed` on.
    """

    prompts: ScorePrompts
    pictures: int
    seed: int
    main: Compared
    untouched: np.ndarray
    judge: PromptJudge | None = None
    others: tuple[Compared, ...] = ()


class Draws(Protocol):
    """What `measure` wants of an `Artist`."""

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Drawn:
        """One picture for each pair of prompt and seed."""
        ...


def draw_each(artist: Draws, prompts: Sequence[str], pictures: int, seed: int) -> Drawn:
    """What an artist draws for `each_with_each`."""
    asked = each_with_each(prompts, pictures, seed)
    return artist.draw([prompt for prompt, _ in asked], [number for _, number in asked])


def measure(
    yardstick: Yardstick,
    artist: Draws,
    *,
    plain: bool = False,
    sanity: bool = True,
    vectors: Tensor | None = None,
    vocabulary: Tensor | None = None,
) -> tuple[Scores, Drawn]:
    """The scores of the state that an artist draws with, and its pictures of the subject.

    Args:
        plain: draw the prompts without the token: for the base, which does not know it.
        sanity: False where other prompts cannot have changed (textual inversion); drift is then 0.
        vectors: `[N, width]` of textual inversion; with `vocabulary`, `[V, width]`, of the base.
    """
    prompts, pictures, seed = yardstick.prompts, yardstick.pictures, yardstick.seed
    drawn = draw_each(artist, prompts.plain if plain else prompts.subject, pictures, seed)
    others = draw_each(artist, prompts.sanity, pictures, seed) if sanity else None
    return scores_of(yardstick, drawn, others, vectors=vectors, vocabulary=vocabulary), drawn


def scores_of(
    yardstick: Yardstick,
    drawn: Drawn,
    sanity: Drawn | None,
    *,
    vectors: Tensor | None = None,
    vocabulary: Tensor | None = None,
) -> Scores:
    """The scores of the state that drew these pictures; see `measure`.

    Args:
        drawn: `yardstick.pictures` of each subject prompt, prompt by prompt.
        sanity: the same of the sanity prompts; None where they cannot have changed.
    """
    pictures, encoder = yardstick.pictures, yardstick.main.encoder
    features = encoder.encode(drawn.pictures)
    subject, error = fidelity(features, yardstick.main.wanted)
    drift = 0.0
    if sanity is not None:
        drift = apart(yardstick.untouched, encoder.encode(sanity.pictures))
    told = [text for text in yardstick.prompts.told for _ in range(pictures)]
    return Scores(
        subject=subject,
        subject_error=error,
        diversity=diversity(features, pictures),
        drift=drift,
        prompt=_prompt_fidelity(yardstick.judge, drawn, told),
        strength=None if vectors is None else strength(vectors),
        relative_strength=None
        if vectors is None or vocabulary is None
        else strength(vectors) / strength(vocabulary),
        others=_others(yardstick.others, drawn, told),
    )


def fidelity(features: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """Mean cosine of drawn `[N, D]` to wanted `[M, D]` features, and its standard error.

    The error is that of the mean over the drawn pictures: those that are wanted are the same for
    every state. 0 for a single picture.
    """
    each = (features.astype(np.float64) @ wanted.T.astype(np.float64)).mean(axis=1)
    error = each.std(ddof=1) / len(each) ** 0.5 if len(each) > 1 else 0.0
    return float(each.mean()), float(error)


def diversity(features: np.ndarray, pictures: int) -> float | None:
    """Mean of 1 - cosine over pairs within each run of `pictures` rows; None without pairs."""
    if pictures < 2:
        return None
    by_prompt = features.astype(np.float64).reshape(-1, pictures, features.shape[1])
    cosines = by_prompt @ by_prompt.transpose(0, 2, 1)
    above = np.triu_indices(pictures, k=1)
    return float((1 - cosines[:, above[0], above[1]]).mean())


def apart(before: np.ndarray, after: np.ndarray) -> float:
    """Mean of 1 - cosine between rows of the same number."""
    return float((1 - (before.astype(np.float64) * after).sum(axis=1)).mean())


def strength(vectors: Tensor) -> float:
    """Mean over vectors of their mean absolute value, as the web UI's users inspect embeddings."""
    return float(vectors.detach().float().abs().mean())


def _prompt_fidelity(judge: PromptJudge | None, drawn: Drawn, told: list[str]) -> float | None:
    """Mean gain over the pictures of which there is something to tell."""
    rows = [i for i, text in enumerate(told) if text]
    if judge is None or not rows:
        return None
    return float(judge.gains(drawn.latents[rows], [told[i] for i in rows]).mean())


def _others(compared: Sequence[Compared], drawn: Drawn, told: list[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    rows = [i for i, text in enumerate(told) if text]
    for one in compared:
        features = one.encoder.encode(drawn.pictures)
        found[one.encoder.name] = fidelity(features, one.wanted)[0]
        if isinstance(one.encoder, TextEncoder) and rows:
            texts = one.encoder.encode_text([told[i] for i in rows])
            found[one.encoder.text_name] = 1 - apart(features[rows], texts)
    return found
