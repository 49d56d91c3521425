"""What a subject looked like before and after: the grid beside its scores.

Beside `score.py`, which draws. Invariant: every row that is drawn has the same prompts and seeds,
column by column, so rows differ by what was learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from disttrain.data.images import encode_png, tile
from disttrain.engine.compared_pictures import spread_evenly

COLUMNS = 8
STATES = 6
"""States that are shown besides the one that was picked; of more, as many spread evenly."""
SMALLEST_SIDE = 96
"""Smaller pictures are enlarged by a whole number, so that one can see them."""


@dataclass(frozen=True)
class SubjectPictures:
    """What is looked at, uint8 `[N, side, side, 3]`: the `wanted` pictures of the subject, what the
    base draws `before`, and what each state draws."""

    wanted: np.ndarray
    before: np.ndarray
    states: tuple[np.ndarray, ...]


def grid_of(pictures: SubjectPictures, steps: Sequence[int], picked: int) -> bytes:
    """A PNG file: the subject, the base, and some of the states, a labelled row each.

    Args:
        steps: of each state, rising; `picked` is one of them.
    """
    columns = spread_evenly(len(pictures.before), COLUMNS)
    rows = {"subject": pictures.wanted[:COLUMNS], "before": pictures.before[columns]}
    for number in sorted({*spread_evenly(len(steps), STATES), list(steps).index(picked)}):
        mark = " picked" if steps[number] == picked else ""
        rows[f"step {steps[number]}{mark}"] = pictures.states[number][columns]
    return encode_png(tile([_enlarged(own) for own in rows.values()], row_labels=list(rows)))


def _enlarged(pictures: np.ndarray) -> list[np.ndarray]:
    times = -(-SMALLEST_SIDE // pictures.shape[1])
    return list(pictures.repeat(times, axis=1).repeat(times, axis=2))
