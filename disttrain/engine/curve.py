"""A loss curve as an SVG picture: every step as a faint dot, a running mean as a line.

Pure text from pure numbers, so that a curve needs no plotting package and opens in any browser.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 640, 360, 60, 36, 16, 40
MOST_POINTS = 2000


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values at each place (fewer at the start)."""
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        means.append(total / min(i + 1, window))
    return means


def loss_curve(points: Sequence[tuple[int, float]], title: str) -> str:
    """The SVG text for (step, loss) points in order of step."""
    points = [(step, loss) for step, loss in points if math.isfinite(loss)]
    body = [
        f'<text x="{LEFT}" y="22" font-size="15">{escape(title)}</text>',
        *(_drawing(points) if points else ['<text x="60" y="180">no steps yet</text>']),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12" fill="#333">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _drawing(points: Sequence[tuple[int, float]]) -> list[str]:
    steps = [step for step, _ in points]
    losses = [loss for _, loss in points]
    first, last = steps[0], max(steps[-1], steps[0] + 1)
    low, high = min(losses), max(losses)
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(loss: float) -> float:
        return TOP + (high - loss) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in range(5):
        level = low + (high - low) * tick / 4
        step = first + (last - first) * tick / 4
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(level):.1f}" y2="{y(level):.1f}" '
            f'stroke="#ddd"/><text x="{LEFT - 6}" y="{y(level) + 4:.1f}" text-anchor="end">'
            f'{level:.3g}</text><text x="{x(step):.1f}" y="{HEIGHT - 20}" text-anchor="middle">'
            f"{step:.0f}</text>"
        )
    every = math.ceil(len(points) / MOST_POINTS)
    parts += [
        f'<circle cx="{x(step):.1f}" cy="{y(loss):.1f}" r="1.6" fill="#9bbbe0"/>'
        for step, loss in points[::every]
    ]
    window = max(1, len(points) // 20)
    means = running_mean(losses, window)
    line = " ".join(
        f"{x(step):.1f},{y(mean):.1f}"
        for step, mean in list(zip(steps, means, strict=True))[::every]
    )
    parts.append(f'<polyline points="{line}" fill="none" stroke="#1f5fa8" stroke-width="2"/>')
    parts.append(
        f'<text x="{WIDTH - RIGHT}" y="22" text-anchor="end">line: mean of {window} steps</text>'
    )
    return parts
