"""Which state of a subject to keep, and what speaks against the others.

After `scores.py`; numbers in, a verdict with reasons out. Invariant: a pure function of the
readings; the state that is picked is never more than 5 % below the highest score among the states
that are not broken, and no earlier one would do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from disttrain.engine.scores import Scores

STRENGTH_LIMIT = 17.0
"""Textual inversion's vectors over the vocabulary's average from which they drown other words. Web
UI users warn from 0.2 on. The words of Stable Diffusion 1 have 768 numbers and a length of about
0.4, so they average about 0.012; 0.2 is 17 times that, and the ratio fits other encoders too."""
MOST_GIVEN_UP = 0.05
"""Share of the highest subject fidelity that may be given up for an earlier state: pictures few in
number have a large standard error."""
DRIFT_GROWTH = 0.01
"""Drift that grew by no more has not grown: what draws the same has rounding left."""
LOSS_FLOOR = 0.5
"""Share of the first loss below which a loss is too good. Most of a denoising loss is noise that
nobody can foretell, whatever was learned of the subject; only pictures known by heart take it away.
A base that has learned nothing yet learns to denoise at all, so there it means nothing."""
FEWEST_LOSSES = 20
"""Steps whose mean loss says something; single ones vary with their timestep."""


@dataclass(frozen=True)
class Reading:
    """A state that was scored. `loss` is the mean training loss up to it (`window_loss`)."""

    step: int
    scores: Scores
    loss: float | None = None


@dataclass(frozen=True)
class Flag:
    """Something that speaks against a state. `broken`: so much that it is not picked."""

    step: int
    kind: str
    reason: str
    broken: bool


@dataclass(frozen=True)
class Verdict:
    """Which state to keep, why, and what was noticed.

    `overtrained_for`: how many of the last readings, in a row, have a flag of a broken state.
    """

    best_step: int
    reason: str
    flags: tuple[Flag, ...]
    overtrained_for: int


def verdict(
    readings: Iterable[Reading], *, held_out: bool, before: Scores | None = None
) -> Verdict:
    """The earliest state that is as good as the best, among those that are not broken.

    As good as: within one standard error of the highest subject fidelity, and within 5 % of it.

    Args:
        readings: at least one, of different steps.
        held_out: whether fidelity is to pictures that training did not see. If not, copying them
            raises it, so a loss under the floor then makes a state broken.
        before: scores of the base model.
    """
    ordered = sorted(readings, key=lambda reading: reading.step)
    assert ordered, "nothing was scored"
    flags = _flags(ordered, held_out)
    broken = {flag.step for flag in flags if flag.broken}
    whole = [reading for reading in ordered if reading.step not in broken]
    highest = max(whole or ordered, key=lambda reading: reading.scores.subject)
    best = next(r for r in whole or ordered if r.scores.subject >= _as_good_as(highest.scores))
    if not _nearer(best.scores, before):
        flags.append(_unlearned(best, before))
    trailing = 0
    while trailing < len(ordered) and ordered[-1 - trailing].step in broken:
        trailing += 1
    reason = _reason(best, highest, all_broken=not whole)
    return Verdict(best.step, reason, tuple(flags), trailing)


def window_loss(losses: Iterable[tuple[int, float]], after: int, upto: int) -> float | None:
    """Mean of the losses of steps `after + 1` to `upto`; None for too few of them.

    Args:
        losses: (step, loss).
    """
    own = [loss for step, loss in losses if after < step <= upto]
    return math.fsum(own) / len(own) if len(own) >= FEWEST_LOSSES else None


def _as_good_as(scores: Scores) -> float:
    """The least subject fidelity that counts as much as this one."""
    return scores.subject - min(scores.subject_error, MOST_GIVEN_UP * abs(scores.subject))


def _nearer(scores: Scores, before: Scores | None) -> bool:
    return before is None or scores.subject > before.subject + before.subject_error


def _flags(ordered: Sequence[Reading], held_out: bool) -> list[Flag]:
    """What speaks against each state, given those before it."""
    found: list[Flag] = []
    first_loss = next((r.loss for r in ordered if r.loss is not None), None)
    best: Reading | None = None
    """The highest so far that was not broken."""
    for reading in ordered:
        own = [_too_strong(reading), _too_good(reading, first_loss, held_out)]
        if best is not None:
            own.append(_worse(reading, best))
        flags = [flag for flag in own if flag is not None]
        found += flags
        higher = best is None or reading.scores.subject > best.scores.subject
        if higher and not any(flag.broken for flag in flags):
            best = reading
    return found


def _too_strong(reading: Reading) -> Flag | None:
    relative = reading.scores.relative_strength
    if relative is None or relative <= STRENGTH_LIMIT:
        return None
    text = (
        f"the vectors average {reading.scores.strength:.3f}, {relative:.0f} times the vocabulary "
        f"(limit {STRENGTH_LIMIT:.0f}): they drown the other words of a prompt"
    )
    return Flag(reading.step, "strength", text, broken=True)


def _too_good(reading: Reading, first: float | None, held_out: bool) -> Flag | None:
    if reading.loss is None or first is None or reading.loss >= LOSS_FLOOR * first:
        return None
    text = (
        f"training loss {reading.loss:.4f}, under half of the {first:.4f} it began with: the "
        "training pictures are known by heart"
    )
    return Flag(reading.step, "loss", text, broken=not held_out)


def _worse(reading: Reading, best: Reading) -> Flag | None:
    """A state that is no better than an earlier one, and worse in something."""
    now, then = reading.scores, best.scores
    gained = now.subject > then.subject and _as_good_as(now) > then.subject
    falls = now.subject < _as_good_as(then)
    if not gained and now.drift > then.drift + DRIFT_GROWTH:
        text = (
            f"subject fidelity {'fell' if falls else 'stands still'} ({then.subject:.3f} at step "
            f"{best.step}, now {now.subject:.3f}) while other pictures drift "
            f"({then.drift:.3f}, now {now.drift:.3f})"
        )
        return Flag(reading.step, "drift", text, broken=True)
    if falls:
        text = f"subject fidelity fell from {then.subject:.3f} at step {best.step} to "
        return Flag(reading.step, "falling", f"{text}{now.subject:.3f}", broken=True)
    return None


def _unlearned(best: Reading, before: Scores | None) -> Flag:
    assert before is not None
    text = (
        f"no nearer to the subject ({best.scores.subject:.3f}) than the base model before training "
        f"({before.subject:.3f}); train longer, with a higher learning rate, or on more pictures"
    )
    return Flag(best.step, "unlearned", text, broken=False)


def _reason(best: Reading, highest: Reading, all_broken: bool) -> str:
    top = f"{highest.scores.subject:.3f}"
    if best.step == highest.step:
        text = f"its subject fidelity {top} is the highest"
    else:
        text = (
            f"the earliest whose subject fidelity ({best.scores.subject:.3f}) is within one "
            f"standard error of the highest ({top} at step {highest.step})"
        )
    if all_broken:
        return f"{text}; every state has a flag, train with a lower learning rate or stop earlier"
    return text
