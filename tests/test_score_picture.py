"""The grid beside scores: which states and pictures are in it, and where."""

from __future__ import annotations

import numpy as np
import pytest

from disttrain.data.images import decode
from disttrain.review.score_picture import COLUMNS, STATES, SubjectPictures, grid_of

ROW = 128 + 2


def flat(count: int, value: int) -> np.ndarray:
    """Pictures of 64 x 64 pixels; number i of value + i."""
    shades = np.arange(count, dtype=np.uint8) + value
    return np.broadcast_to(shades[:, None, None, None], (count, 64, 64, 3)).copy()


def middles(grid: bytes, columns: int) -> list[list[int]]:
    """The shade in the middle of each picture, row by row."""
    pixels = decode(grid, "grid").pixels
    left = pixels.shape[1] - columns * ROW + 2
    downs = range(64, pixels.shape[0], ROW)
    return [[int(pixels[y, left + 64 + x * ROW, 0]) for x in range(columns)] for y in downs]


def test_rows_are_the_subject_the_base_and_the_states() -> None:
    pictures = SubjectPictures(flat(2, 10), flat(4, 20), (flat(4, 30), flat(4, 40)))
    rows = middles(grid_of(pictures, (50, 100), 50), 4)
    assert rows[0][:2] == [10, 11]
    assert rows[1:] == [[20, 21, 22, 23], [30, 31, 32, 33], [40, 41, 42, 43]]


@pytest.mark.parametrize("picked", [0, 1, 17, 39])
def test_of_many_states_some_are_shown_and_the_picked_one_always(picked: int) -> None:
    states = tuple(flat(2, 100 + number) for number in range(40))
    rows = middles(grid_of(SubjectPictures(flat(1, 1), flat(2, 2), states), range(40), picked), 2)
    shown = [row[0] - 100 for row in rows[2:]]
    assert len(shown) <= STATES + 1
    assert shown == sorted(shown)
    assert {0, 39, picked} <= set(shown)


def test_of_many_pictures_as_many_spread_evenly_are_shown() -> None:
    pictures = SubjectPictures(flat(99, 0), flat(40, 50), (flat(40, 100),))
    rows = middles(grid_of(pictures, (9,), 9), COLUMNS)
    assert rows[0] == list(range(COLUMNS))
    assert rows[1][0] == 50
    assert rows[1][-1] == 89
    assert [after - before for before, after in zip(*rows[1:], strict=True)] == [50] * COLUMNS
