"""The loss curve is a drawing that any browser opens, whatever the losses were."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence

import pytest

from disttrain.engine.curve import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MOST_POINTS,
    RIGHT,
    TOP,
    WIDTH,
    loss_curve,
    running_mean,
)

SVG = "{http://www.w3.org/2000/svg}"


def parsed(points: Sequence[tuple[int, float]], title: str = "fox") -> ElementTree.Element:
    return ElementTree.fromstring(loss_curve(points, title))


def dots(root: ElementTree.Element) -> list[tuple[float, float]]:
    return [
        (float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in root.iter(f"{SVG}circle")
    ]


def line(root: ElementTree.Element) -> list[tuple[float, float]]:
    (found,) = root.iter(f"{SVG}polyline")
    pairs = [pair.split(",") for pair in found.get("points", "").split()]
    return [(float(x), float(y)) for x, y in pairs]


def texts(root: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in root.iter(f"{SVG}text")]


def test_every_step_is_a_dot_at_its_place() -> None:
    root = parsed([(1, 1.0), (2, 0.0), (5, 0.5)])
    assert root.tag == f"{SVG}svg"
    left, right, top, bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM
    expected = [
        (left, top),
        (left + (right - left) / 4, bottom),
        (right, (top + bottom) / 2),
    ]
    assert dots(root) == [pytest.approx(place, abs=0.06) for place in expected]
    assert line(root) == dots(root), "the mean of one step is the step"
    assert {"fox", "0", "0.25", "0.5", "0.75", "1", "5"} <= set(texts(root))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_that_are_not_finite_are_left_out(bad: float) -> None:
    clean = [(1, 3.0), (3, 1.0)]
    assert loss_curve([(0, bad), clean[0], (2, bad), clean[1], (4, bad)], "fox") == loss_curve(
        clean, "fox"
    )


@pytest.mark.parametrize("points", [[], [(1, math.nan)]])
def test_no_steps_is_said_in_words(points: list[tuple[int, float]]) -> None:
    root = parsed(points)
    assert texts(root) == ["fox", "no steps yet"]
    assert dots(root) == []


@pytest.mark.parametrize(
    "points", [[(7, 0.3)], [(0, 0.0)], [(1, 2.0), (2, 2.0)], [(1, -1e30), (2, 1e30)], [(5, 1e-300)]]
)
def test_flat_single_and_extreme_curves_stay_on_the_sheet(points: list[tuple[int, float]]) -> None:
    root = parsed(points)
    places = dots(root) + line(root)
    assert len(places) == 2 * len(points)
    for x, y in places:
        assert LEFT - 0.06 <= x <= WIDTH - RIGHT + 0.06
        assert TOP - 0.06 <= y <= HEIGHT - BOTTOM + 0.06
    assert "nan" not in "".join(texts(root))


def test_a_title_is_text_and_not_markup() -> None:
    title = "<b>\"fox\" & 'owl'</b>"
    assert texts(parsed([(1, 1.0)], title))[0] == title


def test_long_runs_are_thinned_but_averaged_over_all_steps() -> None:
    points = [(step, float(step % 2)) for step in range(1, 50_001)]
    root = parsed(points)
    assert MOST_POINTS / 2 <= len(dots(root)) <= MOST_POINTS
    assert len(line(root)) == len(dots(root))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    assert all(abs(y - middle) < 1 for _, y in line(root)[len(line(root)) // 2 :])
    assert "line: mean of 2500 steps" in texts(root)


def test_running_mean() -> None:
    assert running_mean([], 3) == []
    assert running_mean([3.0, 1.0, 2.0, 6.0], 1) == [3.0, 1.0, 2.0, 6.0]
    assert running_mean([3.0, 1.0, 2.0, 6.0], 2) == [3.0, 2.0, 1.5, 4.0]
    assert running_mean([3.0, 1.0, 2.0, 6.0], 9) == [3.0, 2.0, 2.0, 3.0]
