"""Aspect-ratio buckets: which sizes there are, and which one a picture gets."""

from __future__ import annotations

import math

import numpy as np
import pytest

from disttrain.data.buckets import assign, bucket_sizes


@pytest.mark.parametrize(
    ("resolution", "step", "aspect"),
    [(512, 64, 2.0), (768, 64, 2.0), (1024, 64, 4.0), (64, 8, 2.0), (500, 64, 2.0), (64, 64, 1.0)],
)
def test_sizes_keep_their_promises(resolution: int, step: int, aspect: float) -> None:
    sizes = bucket_sizes(resolution, step, aspect)
    square = resolution // step * step
    assert (square, square) in sizes
    for height, width in sizes:
        assert height % step == width % step == 0
        assert height * width <= resolution**2
        assert max(height, width) <= aspect * min(height, width)
        assert (width, height) in sizes
        # Another step on the longer side would be too much: the area is as large as can be.
        longer, short = max(height, width) + step, min(height, width)
        square_one = height == width  # is always there, whatever would fit beside it
        assert square_one or longer * short > resolution**2 or longer > aspect * short
    aspects = [width / height for height, width in sizes]
    assert aspects == sorted(set(aspects))


def test_known_sizes() -> None:
    assert bucket_sizes(512, 64, 2.0) == [
        (640, 384),
        (576, 448),
        (512, 512),
        (448, 576),
        (384, 640),
    ]


def test_a_picture_gets_the_nearest_aspect_ratio() -> None:
    sizes = bucket_sizes(768, 64, 2.0)
    shapes = np.random.default_rng(0).integers(10, 5000, size=(2000, 2))
    found = assign(shapes, sizes)
    for (height, width), bucket in zip(shapes.tolist(), found.tolist(), strict=True):
        ratio = math.log(width / height)
        away = [abs(math.log(w / h) - ratio) for h, w in sizes]
        assert away[bucket] == pytest.approx(min(away), abs=1e-12)


def test_one_bucket_takes_all() -> None:
    assert assign(np.array([[10, 5000], [5000, 10]]), [(64, 64)]).tolist() == [0, 0]
