"""The order as a pure function: exactly once an epoch, the same from any entry point."""

import time

import numpy as np
import pytest

from disttrain.data.order import SampleOrder


@pytest.mark.parametrize(
    ("sizes", "window"),
    [
        (1, None),
        (7, None),
        (100, None),
        ([5, 1, 9, 0, 3], None),
        ([5, 1, 9, 0, 3], 1),
        ([5, 1, 9, 0, 3], 4),
        ([5, 1, 9, 0, 3], 17),
        ([5, 1, 9, 0, 3], 18),
        ([5, 1, 9, 0, 3], 1000),
        ([0, 0, 2], 2),
        ([37] * 11, 50),
    ],
)
def test_every_sample_once_an_epoch(sizes, window):
    order = SampleOrder(sizes, 3, "fox", window=window)
    for epoch in range(5):
        start = epoch * order.size
        seen = [order.sample_at(position) for position in range(start, start + order.size)]
        assert sorted(seen) == list(range(order.size))
        assert order.epoch_of(start) == order.epoch_of(start + order.size - 1) == epoch


@pytest.mark.parametrize("window", [None, 13])
def test_any_entry_point_gives_the_same_sequence(window):
    whole = SampleOrder([20, 11, 9], 3, "fox", window=window)
    sequence = [whole.sample_at(position) for position in range(130)]
    for start in (0, 1, 39, 40, 41, 77, 120):
        order = SampleOrder([20, 11, 9], 3, "fox", window=window)
        assert [order.sample_at(position) for position in range(start, 130)] == sequence[start:]
    backwards = [whole.sample_at(position) for position in reversed(range(130))]
    assert backwards[::-1] == sequence


@pytest.mark.parametrize("window", [None, 40])
def test_epochs_seeds_subjects_and_streams_differ(window):
    def epoch(number: int, *words, seed: int = 0) -> list[int]:
        order = SampleOrder([100, 60, 40], seed, *words, window=window)
        return [order.sample_at(position) for position in range(200 * number, 200 * number + 200)]

    orders = [
        epoch(0, "fox"),
        epoch(1, "fox"),
        epoch(2, "fox"),
        epoch(0, "fox", seed=1),
        epoch(0, "cat"),
        epoch(0, "fox", "class"),
    ]
    for number, first in enumerate(orders):
        for second in orders[:number]:
            assert np.mean(np.equal(first, second)) < 0.1


def test_positions_are_uniform():
    counts = np.zeros((6, 6))
    order = SampleOrder(6, 0, "fox")
    for position in range(6 * 3000):
        counts[position % 6, order.sample_at(position)] += 1
    assert np.abs(counts / 3000 - 1 / 6).max() < 0.03  # 4.4 standard deviations


def test_a_window_reads_few_shards_and_crosses_them():
    sizes, window = [50] * 20, 100
    order = SampleOrder(sizes, 1, "fox", window=window)
    shard = np.array([order.sample_at(position) // 50 for position in range(1000)])
    touched = [len(np.unique(shard[start : start + window])) for start in range(0, 900, 10)]
    assert max(touched) <= 6  # two pieces of 100 samples touch at most three shards each
    cuts = [np.flatnonzero(np.diff(shard) != 0).size]
    assert cuts[0] > 400, "samples of different shards must be mixed"
    first_shards = [order.sample_at(1000 * epoch) // 50 for epoch in range(30)]
    assert len(set(first_shards)) > 10, "shards must come in another order each epoch"


def test_a_million_samples_start_anywhere_at_once():
    start = time.monotonic()
    order = SampleOrder(1_000_000, 0, "fox")
    first = order.sample_at(123_456_789)
    windowed = SampleOrder([1000] * 1000, 0, "fox", window=10_000)
    windowed.sample_at(987_654_321)
    assert time.monotonic() - start < 1
    start = time.monotonic()
    batch = [order.sample_at(123_456_789 + step) for step in range(10_000)]
    assert batch[0] == first
    assert time.monotonic() - start < 1, "an epoch's permutation must be kept"


def test_a_batch_across_two_epochs_keeps_both(monkeypatch):
    from disttrain import randomness

    drawn = []
    permutation = randomness.permutation
    monkeypatch.setattr(
        randomness, "permutation", lambda *args: drawn.append(args) or permutation(*args)
    )
    order = SampleOrder(1000, 0, "fox")
    for _ in range(50):
        order.sample_at(999)
        order.sample_at(1000)
    assert len(drawn) == 2
    for epoch in range(100):
        order.sample_at(1000 * epoch)
    assert len(order._pieces) == 2, "memory must not grow with the epochs"


def test_known_order():
    """The order is part of a run's meaning: changing it breaks resuming and must be deliberate."""
    order = SampleOrder(8, 0, "fox")
    assert [order.sample_at(position) for position in range(16)] == KNOWN
    windowed = SampleOrder([3, 5], 0, "fox", window=3)
    assert [windowed.sample_at(position) for position in range(16)] == KNOWN_WINDOWED


KNOWN = [5, 4, 2, 3, 0, 1, 6, 7, 0, 2, 7, 4, 6, 3, 1, 5]
KNOWN_WINDOWED = [1, 2, 0, 3, 5, 4, 7, 6, 0, 1, 4, 2, 3, 7, 5, 6]


@pytest.mark.parametrize("sizes", [0, -1, [], [0, 0], [3, -1]])
def test_impossible_sizes_are_defects(sizes):
    with pytest.raises(AssertionError):
        SampleOrder(sizes, 0, "fox")


def test_impossible_positions_and_windows_are_defects():
    order = SampleOrder(3, 0, "fox")
    with pytest.raises(AssertionError):
        order.sample_at(-1)
    with pytest.raises(AssertionError):
        order.epoch_of(-1)
    with pytest.raises(AssertionError):
        SampleOrder(3, 0, "fox", window=0)
