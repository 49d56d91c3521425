"""How well a run learned its subjects: the `score` command.

Draws with the base and with every saved state, measures each, and leaves `scores.json` beside the
results, and `scores.png`, the same to look at. Invariant: nothing else is written, and the first
holds all that is needed to make the same numbers again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from disttrain.config import RunConfig
from disttrain.config_file import load_config
from disttrain.engine.artist import Artist, Drawn
from disttrain.engine.compared_pictures import (
    Against,
    as_base_keeps,
    compared_pictures,
    draw_settings,
)
from disttrain.engine.fleet_folder import FINISHED, FleetFolder
from disttrain.engine.metrics import MetricsLog
from disttrain.engine.overtraining import Reading, Verdict, verdict, window_loss
from disttrain.engine.prompt_judge import PromptJudge
from disttrain.engine.run_folder import RunFolder
from disttrain.engine.score_prompts import score_prompts
from disttrain.engine.scores import Compared, Scores, Yardstick, draw_each, measure
from disttrain.engine.slot import alone
from disttrain.errors import ConfigError, ModelError, UserError
from disttrain.files import write_bytes, write_json
from disttrain.models.base import BaseModel, configured_base
from disttrain.models.encoders import open_encoder
from disttrain.models.text import PromptTokenizer
from disttrain.review.score_picture import SubjectPictures, grid_of
from disttrain.review.states import SavedState, put, saved_states

FORMAT = 1
SCORES_FILE = "scores.json"
PICTURE_FILE = "scores.png"
SILENT_SECONDS = 2.0


@dataclass(frozen=True)
class ScoreRequest:
    """What to score, and what to change of the run's settings for it."""

    subject: str = ""
    """Name of the subject; empty: all."""
    pictures: int | None = None
    steps: int | None = None
    seed: int | None = None
    features: str = ""
    held_out: str = ""
    """Pictures of the subject that training did not see; of one subject."""
    clip: str = ""
    """Folder or hub id of a CLIP model to report beside."""
    dino: str = ""
    """The same of a DINO model."""


@dataclass(frozen=True)
class SubjectScores:
    """Everything that was found of one subject."""

    name: str
    member: RunConfig
    features: str
    against: Against
    before: Scores
    states: tuple[SavedState, ...]
    readings: tuple[Reading, ...]
    pictures: SubjectPictures
    verdict: Verdict
    passed_over: tuple[str, ...]

    @property
    def steps(self) -> tuple[int, ...]:
        """Of each state, rising."""
        return tuple(state.step for state in self.states)


def score(run: Path, request: ScoreRequest) -> Iterator[SubjectScores]:
    """Score the subjects of a run, or of a fleet, one after another; writes `scores.json` and
    `scores.png` of each.

    Raises:
        UserError: no such run or subject, nothing saved yet, or what scoring needs is missing.
    """
    chosen = members_of(run, request.subject)
    if request.held_out and len(chosen) > 1:
        raise ConfigError("--held-out: the run has several subjects; give --subject too")
    members = [changed(member, request) for member in chosen]
    for member in members:
        score_prompts(member, member.subjects[0])
    bench = Bench(members[0], request)
    waiting: UserError | None = None
    scored = 0
    for member in members:
        try:
            found = score_subject(run, member, bench)
        except ModelError as error:  # of a fleet, some may have just begun
            waiting = waiting or error
            if len(members) > 1:
                bench.tell(f"passed over {member.subjects[0].name}: {error}", at_once=True)
            continue
        scored += 1
        folder = RunFolder(run).subject(found.name)
        write_json(folder / SCORES_FILE, as_json(found, folder))
        write_bytes(
            folder / PICTURE_FILE, grid_of(found.pictures, found.steps, found.verdict.best_step)
        )
        yield found
    if waiting is not None and not scored:
        raise waiting


def members_of(run: Path, name: str) -> list[RunConfig]:
    """The settings of each subject of a run or fleet, or of the named one.

    Raises:
        ConfigError: no run folder, or no such subject.
    """
    folder = RunFolder(run)
    if folder.config.is_file():
        config = load_config(folder.config)
        members = [alone(config, subject) for subject in config.subjects]
    else:
        found = sorted(run.glob("subjects/*/config.yaml"))
        members = [load_config(path) for path in found]
    if not members:
        raise ConfigError(f"{run}: no run folder (config.yaml is not in it); give one from runs/")
    chosen = [member for member in members if not name or member.subjects[0].name == name]
    if not chosen:
        known = ", ".join(member.subjects[0].name for member in members)
        raise ConfigError(f"--subject: {name} is not in this run; it has {known}")
    return chosen


def changed(member: RunConfig, request: ScoreRequest) -> RunConfig:
    """A member's settings with what the command line changes of them."""
    for option, value, low in (
        ("--pictures", request.pictures, 1),
        ("--steps", request.steps, 1),
        ("--seed", request.seed, 0),
    ):
        if value is not None and value < low:
            raise ConfigError(f"{option}: {value} is impossible; it must be at least {low}")
    old = member.score
    new = replace(
        old,
        pictures=old.pictures if request.pictures is None else request.pictures,
        steps=old.steps if request.steps is None else request.steps,
        seed=old.seed if request.seed is None else request.seed,
        features=request.features or old.features,
    )
    (subject,) = member.subjects
    subject = replace(subject, held_out=request.held_out or subject.held_out)
    return replace(member, score=new, subjects=(subject,))


class Bench:
    """What is loaded once for all subjects: encoders, and the base model, twice.

    `base` stays as it is: it judges, and shows what was before. Into `tuned` the states are put.
    """

    def __init__(self, member: RunConfig, request: ScoreRequest) -> None:
        self.started = time.monotonic()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.main = open_encoder(member.score.features, self.device)
        self.others = [
            open_encoder(spec, self.device) for spec in (request.clip, request.dino) if spec
        ]
        self._loaded: tuple[tuple[str, str, str], BaseModel, BaseModel] | None = None

    def bases(self, member: RunConfig) -> tuple[BaseModel, BaseModel]:
        """The untouched base, and the one that states are put into."""
        key = (member.base_model, member.base_revision, member.base_prediction_type)
        if self._loaded is None or self._loaded[0] != key:
            self.tell(f"loading base model {member.base_model}")
            self._loaded = None
            self._loaded = (key, configured_base(member), configured_base(member))
        return self._loaded[1:]

    def tell(self, text: str, at_once: bool = False) -> None:
        """A line on standard error, once it takes long enough to wonder."""
        if at_once or time.monotonic() - self.started > SILENT_SECONDS:
            print(text, file=sys.stderr, flush=True)


def score_subject(run: Path, member: RunConfig, bench: Bench) -> SubjectScores:
    """Every number of one subject.

    Raises:
        UserError: nothing saved yet, pictures that cannot be read, or a model that does not fit.
    """
    (subject,) = member.subjects
    folder = RunFolder(run).subject(subject.name)
    states = saved_states(member, folder, _result_step(run, subject.name))
    against, pictures = compared_pictures(member)
    base, tuned = bench.bases(member)
    settings = draw_settings(member, base)
    plain = Artist(base, PromptTokenizer(base.tokenizer), "", settings, bench.device)
    bench.tell(f"{subject.name}: what the base model draws")
    yardstick = make_yardstick(member, bench, plain, pictures)
    before, first = measure(yardstick, plain, plain=True, sanity=False)
    losses = _losses(run, subject.name)
    readings: list[Reading] = []
    kept: list[SavedState] = []
    drawn: list[np.ndarray] = []
    passed_over: list[str] = []
    for number, state in enumerate(states, start=1):
        bench.tell(f"{subject.name}: step {state.step} ({number} of {len(states)})")
        try:
            scores, own = score_state(member, tuned, state, yardstick, plain)
        except UserError as error:
            passed_over.append(str(error))
            bench.tell(f"passed over: {error}", at_once=True)
            continue
        loss = window_loss(losses, readings[-1].step if readings else 0, state.step)
        readings.append(Reading(state.step, scores, loss))
        kept.append(state)
        drawn.append(own.pictures)
    if not readings:
        raise ModelError(f"{folder}: no state could be scored: {passed_over[0]}")
    return SubjectScores(
        name=subject.name,
        member=member,
        features=bench.main.name,
        against=against,
        before=before,
        states=tuple(kept),
        readings=tuple(readings),
        pictures=SubjectPictures(pictures, first.pictures, tuple(drawn)),
        verdict=verdict(readings, held_out=against.held_out, before=before),
        passed_over=tuple(passed_over),
    )


def score_state(
    member: RunConfig,
    tuned: BaseModel,
    state: SavedState,
    yardstick: Yardstick,
    plain: Artist,
) -> tuple[Scores, Drawn]:
    """The scores and pictures of one saved state, drawn as `plain` draws with the base."""
    in_place = put(member, tuned, state)
    token = member.subjects[0].token
    artist = Artist(tuned, in_place.tokenizer, token, plain.settings, plain.device, plain.vae)
    return measure(
        yardstick,
        artist,
        sanity=in_place.vectors is None,
        vectors=in_place.vectors,
        vocabulary=in_place.vocabulary,
    )


def make_yardstick(
    member: RunConfig, bench: Bench, plain: Artist, pictures: np.ndarray
) -> Yardstick:
    """What the states of one subject are measured against."""
    prompts = score_prompts(member, member.subjects[0])
    score = member.score

    kept = as_base_keeps(member, pictures, plain.vae)
    sanity = draw_each(plain, prompts.sanity, score.pictures, score.seed)
    return Yardstick(
        prompts=prompts,
        pictures=score.pictures,
        seed=score.seed,
        main=Compared(bench.main, bench.main.encode(kept)),
        untouched=bench.main.encode(sanity.pictures),
        judge=PromptJudge(plain.base, bench.device),
        others=tuple(Compared(encoder, encoder.encode(pictures)) for encoder in bench.others),
    )


def _result_step(run: Path, name: str) -> int | None:
    """The step whose state is the result of a subject, in a run or a fleet; None without one."""
    end = RunFolder(run).finished().get(name)
    if end is None:
        status = FleetFolder(run).read(name)
        end = status.end if status.status == FINISHED else None
    return None if end is None else end.picked


def _losses(run: Path, name: str) -> list[tuple[int, float]]:
    """(step, loss) of a subject; of a fleet each has its own log."""
    folder = RunFolder(run)
    own = folder.subject(name) / "metrics.jsonl"
    records = MetricsLog(own if own.is_file() else folder.metrics).read()
    return [(record.step, record.loss) for record in records if record.subject == name]


def as_json(found: SubjectScores, folder: Path) -> dict[str, Any]:
    """The content of `scores.json`; paths are relative to the subject's folder."""
    member, score = found.member, found.member.score
    prompts = score_prompts(member, member.subjects[0])
    pairs = zip(found.states, found.readings, strict=True)
    return {
        "format": FORMAT,
        "subject": found.name,
        "features": found.features,
        "compared_with": asdict(found.against),
        "through_autoencoder": score.through_autoencoder,
        "prompts": list(prompts.subject),
        "prompts_without_token": list(prompts.plain),
        "sanity_prompts": list(prompts.sanity),
        "pictures": score.pictures,
        "steps": score.steps,
        "guidance_scale": score.guidance_scale,
        "seed": score.seed,
        "size": member.data.resolution,
        "base_model": member.base_model,
        "before": asdict(found.before),
        "states": [
            {
                "step": state.step,
                "file": state.path.relative_to(folder).as_posix(),
                "loss": reading.loss,
                **asdict(reading.scores),
            }
            for state, reading in pairs
        ],
        "passed_over": list(found.passed_over),
        "picked": found.verdict.best_step,
        "reason": found.verdict.reason,
        "flags": [asdict(flag) for flag in found.verdict.flags],
    }
