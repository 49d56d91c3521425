"""Aspect-ratio buckets: the few sizes that pictures of every shape are brought to.

Between the shapes that a source knows and the order. Invariant: the sizes are a function of three
settings, and a picture's bucket one of its own width and height, so neither depends on the other
pictures.
"""

from __future__ import annotations

import numpy as np

Size = tuple[int, int]
"""Height and width in pixels."""


def bucket_sizes(resolution: int, step: int, max_aspect: float) -> list[Size]:
    """Sizes with sides in multiples of `step`, an area of at most resolution squared, and an aspect
    ratio of at most `max_aspect` either way; from upright to wide.

    For each short side the longest other one that fits (NovelAI's aspect-ratio bucketing, 2022).
    The square of the resolution, cut to a multiple of `step`, is always among them.
    """
    assert 0 < step <= resolution
    assert max_aspect >= 1
    area = resolution * resolution
    found: set[Size] = set()
    for short in range(step, resolution + 1, step):
        long = area // short // step * step
        if long <= short * max_aspect:
            found |= {(long, short), (short, long)}
    side = resolution // step * step
    return sorted(found | {(side, side)}, key=lambda size: (size[1] / size[0], size))


def assign(shapes: np.ndarray, sizes: list[Size]) -> np.ndarray:
    """Number of the bucket of each picture: the one whose aspect ratio is nearest as a factor.

    Args:
        shapes: `[N, 2]` heights and widths in pixels.

    Returns:
        int32 `[N]`.
    """
    aspects = np.log(np.array([width / height for height, width in sizes]))
    ratios = np.log(shapes[:, 1] / shapes[:, 0])
    middles = (aspects[1:] + aspects[:-1]) / 2
    assert (np.diff(aspects) > 0).all(), "one bucket for each aspect ratio, in order"
    return np.searchsorted(middles, ratios).astype(np.int32)
