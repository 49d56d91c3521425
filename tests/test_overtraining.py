"""Which state is picked and what is said against the others, on curves made by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from disttrain.engine.overtraining import (
    FEWEST_LOSSES,
    MOST_GIVEN_UP,
    STRENGTH_LIMIT,
    Reading,
    Verdict,
    verdict,
    window_loss,
)
from disttrain.engine.scores import Scores


def scores(subject: float, drift: float = 0.0, error: float = 0.02, **other: Any) -> Scores:
    return Scores(subject, error, 0.5, drift, **other)


def curve(
    subjects: list[float],
    drifts: list[float] | None = None,
    losses: list[float] | None = None,
    error: float = 0.02,
) -> list[Reading]:
    """States at steps 100, 200, ..."""
    count = len(subjects)
    return [
        Reading(100 * (i + 1), scores(subject, drift, error), loss)
        for i, (subject, drift, loss) in enumerate(
            zip(subjects, drifts or [0.0] * count, losses or [None] * count, strict=True)
        )
    ]


def kinds(found: Verdict) -> list[tuple[int, str]]:
    return [(flag.step, flag.kind) for flag in found.flags]


def test_the_highest_is_picked_where_it_stands_out() -> None:
    found = verdict(curve([0.3, 0.5, 0.6]), held_out=True)
    assert found.best_step == 300
    assert found.flags == ()
    assert found.overtrained_for == 0
    assert "0.600 is the highest" in found.reason


def test_the_earliest_within_one_standard_error_is_picked() -> None:
    found = verdict(curve([0.3, 0.59, 0.595, 0.6]), held_out=True)
    assert found.best_step == 200
    assert "(0.590) is within one standard error of the highest (0.600 at step 400)" in found.reason


@pytest.mark.parametrize("error", [0.0, 0.005, 0.05, 0.3])
@pytest.mark.parametrize("last", [0.2, 0.45, 0.59])
def test_the_picked_one_is_within_five_percent_of_the_best(error: float, last: float) -> None:
    """The requirement, on runs driven far past their best point, however noisy the pictures."""
    rise = [0.6 * (1 - math.exp(-i / 4)) for i in range(20)]
    fall = [rise[-1] + (last - rise[-1]) * i / 20 for i in range(1, 21)]
    drifts = [0.004 * i**1.5 for i in range(40)]
    subjects = rise + fall
    found = verdict(curve(subjects, drifts, error=error), held_out=True)
    picked = subjects[found.best_step // 100 - 1]
    assert picked >= (1 - MOST_GIVEN_UP) * max(subjects)
    assert found.best_step <= 2000
    assert found.overtrained_for >= 10


def test_slow_growth_under_drift_is_not_given_up() -> None:
    """Each step is within the error of the last; the sum of them is not."""
    subjects = [0.50 + 0.01 * i for i in range(20)]
    found = verdict(curve(subjects, [0.02 * i for i in range(20)]), held_out=True)
    assert subjects[found.best_step // 100 - 1] >= (1 - MOST_GIVEN_UP) * subjects[-1]


def test_standing_still_while_others_drift_is_flagged() -> None:
    found = verdict(curve([0.3, 0.6, 0.6, 0.55], [0.0, 0.1, 0.2, 0.3]), held_out=True)
    assert kinds(found) == [(300, "drift"), (400, "drift")]
    assert found.best_step == 200
    assert found.overtrained_for == 2
    assert "stands still (0.600 at step 200, now 0.600)" in found.flags[0].reason
    assert "fell (0.600 at step 200, now 0.550)" in found.flags[1].reason
    assert "drift (0.100, now 0.300)" in found.flags[1].reason


def test_drift_alone_is_no_fault_and_its_rounding_is_none() -> None:
    growing = verdict(curve([0.3, 0.5, 0.7], [0.0, 0.3, 0.6]), held_out=True)
    assert growing.flags == ()
    still = verdict(curve([0.6, 0.6, 0.6], [0.1, 0.105, 0.109]), held_out=True)
    assert still.flags == ()


def test_a_fall_without_drift_is_flagged() -> None:
    found = verdict(curve([0.3, 0.6, 0.5]), held_out=True)
    assert kinds(found) == [(300, "falling")]
    assert found.overtrained_for == 1


def test_a_slow_fall_is_measured_from_the_best() -> None:
    """Each state is within the error of the one before it."""
    found = verdict(curve([0.3, 0.60, 0.59, 0.58, 0.57, 0.56]), held_out=True)
    assert kinds(found) == [(500, "falling"), (600, "falling")]
    assert "from 0.600 at step 200 to 0.570" in found.flags[0].reason


def test_what_recovers_was_not_overtrained() -> None:
    found = verdict(curve([0.3, 0.6, 0.5, 0.7]), held_out=True)
    assert found.best_step == 400
    assert found.overtrained_for == 0


def test_vectors_past_the_limit_are_broken_however_alike() -> None:
    strong = scores(0.9, strength=0.3, relative_strength=STRENGTH_LIMIT + 1)
    mild = scores(0.5, strength=0.2, relative_strength=STRENGTH_LIMIT)
    found = verdict([Reading(100, mild), Reading(200, strong)], held_out=True)
    assert found.best_step == 100
    assert kinds(found) == [(200, "strength")]
    assert "0.300, 18 times the vocabulary" in found.flags[0].reason


def test_a_loss_under_the_floor_counts_only_where_copying_does() -> None:
    readings = curve([0.3, 0.5, 0.7], losses=[0.2, 0.11, 0.09])
    with_held_out = verdict(readings, held_out=True)
    assert kinds(with_held_out) == [(300, "loss")]
    assert with_held_out.best_step == 300
    without = verdict(readings, held_out=False)
    assert kinds(without) == [(300, "loss")]
    assert without.best_step == 200


def test_where_every_state_is_broken_the_best_of_them_is_named_and_said_so() -> None:
    strong = {"strength": 0.3, "relative_strength": 20.0}
    readings = [Reading(i, scores(0.1 * i, **strong)) for i in (1, 2, 3)]
    found = verdict(readings, held_out=True)
    assert found.best_step == 3
    assert "every state has a flag" in found.reason
    assert found.overtrained_for == 3


def test_a_subject_that_was_not_learned_is_said() -> None:
    readings = curve([0.3, 0.31])
    assert kinds(verdict(readings, held_out=True, before=scores(0.3))) == [(100, "unlearned")]
    assert verdict(readings, held_out=True, before=scores(0.2)).flags == ()


def test_the_order_of_readings_does_not_matter() -> None:
    readings = curve([0.3, 0.6, 0.5, 0.4], [0.0, 0.1, 0.2, 0.3], [0.2, 0.15, 0.09, 0.08])
    assert verdict(readings[::-1], held_out=False) == verdict(readings, held_out=False)


def test_a_single_state_is_picked() -> None:
    assert verdict(curve([0.1]), held_out=False).best_step == 100


def test_the_loss_of_a_window_needs_enough_steps() -> None:
    losses = [(step, float(step)) for step in range(1, 101)]
    assert window_loss(losses, 50, 100) == pytest.approx(75.5)
    assert window_loss(losses, 0, FEWEST_LOSSES) == pytest.approx((FEWEST_LOSSES + 1) / 2)
    assert window_loss(losses, 0, FEWEST_LOSSES - 1) is None
    assert window_loss(losses, 95, 100) is None
