"""Draws are pure functions of (seed, stream, index), the same on every platform and release."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from disttrain import randomness

FOX = ("fox", "noise")
GOLDEN = {
    "normal": [0.7884492874145508, 0.8407815098762512, -1.1574419736862183],
    "uniform": 0.5975322525340917,
    "integers": [469, 939, 949, 917],
    "permutation": [2, 1, 7, 3, 5, 6, 4, 0],
    "large": 0.35027748925275226,
}


def test_a_draw_depends_on_nothing_that_came_before() -> None:
    expected = randomness.normal((4, 3), 7, FOX, 5)
    torch.manual_seed(1)
    np.random.seed(1)
    for index in (4, 5, 6, 5):
        found = randomness.normal((4, 3), 7, FOX, index)
    assert np.array_equal(found, expected)
    randomness._key.cache_clear()
    assert np.array_equal(randomness.normal((4, 3), 7, FOX, 5), expected)


def test_draws_leave_global_generators_alone() -> None:
    numpy_before = np.random.get_state()[1].copy()
    torch_before = torch.get_rng_state()
    randomness.normal((4,), 0, FOX)
    randomness.permutation(9, 0, FOX)
    randomness.initial_latents((4, 8, 8), 3)
    assert np.array_equal(np.random.get_state()[1], numpy_before)
    assert torch.equal(torch.get_rng_state(), torch_before)


@pytest.mark.parametrize(
    "other",
    [
        (8, FOX, 5),
        (7, FOX, 6),
        (7, ("fox", "order"), 5),
        (7, ("owl", "noise"), 5),
        (7, ("fox",), 5),
        (7, ("foxnoise",), 5),
        (7, ("fo", "xnoise"), 5),
        (7, ("fox", "noise", ""), 5),
    ],
)
def test_other_seeds_streams_and_indices_are_uncorrelated(
    other: tuple[int, tuple[str, ...], int],
) -> None:
    size = 20_000
    first = randomness.normal((size,), 7, FOX, 5)
    second = randomness.normal((size,), *other)
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / size**0.5
    overlap = np.intersect1d(first, second).size  # float32 draws coincide now and then
    assert overlap < 0.02 * size


def test_neighbouring_indices_do_not_overlap() -> None:
    """A long draw of one index must not run into the numbers of the next."""
    long = randomness.generator(0, FOX, 0).random(100_000)
    following = randomness.generator(0, FOX, 1).random(1000)
    assert not np.isin(following, long).any()


def test_golden_numbers() -> None:
    """Frozen: another value here means that no run can be repeated or gone on with."""
    np.testing.assert_array_equal(
        randomness.normal((3,), 0, FOX, 0), np.array(GOLDEN["normal"], dtype=np.float32)
    )
    assert randomness.uniform(0, FOX, 1) == GOLDEN["uniform"]
    assert [randomness.integer(1000, 0, FOX, i) for i in range(4)] == GOLDEN["integers"]
    assert randomness.permutation(8, 0, FOX, 2).tolist() == GOLDEN["permutation"]
    assert randomness.uniform(2**70, ("füchslein",), 2**63) == GOLDEN["large"]


def test_distributions() -> None:
    size = 4000
    uniform = np.array([randomness.uniform(3, FOX, i) for i in range(size)])
    assert 0 <= uniform.min() < uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 4 / (12 * size) ** 0.5
    assert abs(np.corrcoef(uniform[:-1], uniform[1:])[0, 1]) < 4 / size**0.5
    counts = np.bincount([randomness.integer(10, 3, FOX, i) for i in range(size)], minlength=10)
    assert len(counts) == 10
    assert ((counts - size / 10) ** 2 / (size / 10)).sum() < 33  # chi square, 9 degrees, p = 1e-4
    normal = randomness.normal((100_000,), 3, FOX)
    assert normal.dtype == np.float32
    assert abs(normal.mean()) < 4 / 100_000**0.5
    assert abs(normal.std() - 1) < 4 / 200_000**0.5


def test_permutations_hold_each_number_once_and_differ() -> None:
    found = [randomness.permutation(20, 0, FOX, i) for i in range(50)]
    assert all(sorted(order) == list(range(20)) for order in found)
    assert len({tuple(order) for order in found}) == 50


@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_initial_latents_are_what_diffusers_draws(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    expected = randn_tensor((1, 4, 8, 8), generator=generator, dtype=torch.float32)
    found = randomness.initial_latents((4, 8, 8), seed)
    assert found.shape == (4, 8, 8)
    assert torch.equal(found, expected[0])
