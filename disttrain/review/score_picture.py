"""What a subject looked like before and after: the grid beside its scores.

Beside `score.py`, which draws. Invariant: every row that is drawn has the same prompts and seeds,
column by column, so rows differ by what was learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from disttrain.data.images import encode_png, tile

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
    spread = np.linspace(0, len(steps) - 1, min(STATES, len(steps))).round().astype(int)
    shown = sorted({*spread.tolist(), list(steps).index(picked)})
    rows = [("subject", pictures.wanted), ("before", pictures.before)]
    for number in shown:
        mark = " picked" if steps[number] == picked else ""
        rows.append((f"step {steps[number]}{mark}", pictures.states[number]))
    columns = _columns(len(pictures.before))
    chosen = [
        (label, own[:COLUMNS] if i == 0 else own[columns]) for i, (label, own) in enumerate(rows)
    ]
    return encode_png(
        tile([_enlarged(own) for _, own in chosen], row_labels=[r for r, _ in chosen])
    )


def _columns(drawn: int) -> list[int]:
    """Which drawn pictures are shown, spread evenly over the prompts."""
    return np.linspace(0, drawn - 1, min(COLUMNS, drawn)).round().astype(int).tolist()


def _enlarged(pictures: np.ndarray) -> list[np.ndarray]:
    times = -(-SMALLEST_SIDE // pictures.shape[1])
    return list(pictures.repeat(times, axis=1).repeat(times, axis=2))
