"""The order of pictures of several sizes: one bucket a step, nothing lost, nothing starved."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest

from disttrain.data.bucket_order import BucketOrder
from disttrain.data.order import SampleOrder


def order_of(
    counts: list[int], step_size: int, drop: bool = False, window: int | None = None, seed: int = 0
) -> BucketOrder:
    buckets = np.repeat(np.arange(len(counts)), counts)
    np.random.default_rng(1).shuffle(buckets)
    sizes = [len(buckets) // 3, len(buckets) - len(buckets) // 3]
    plain = SampleOrder(sizes, seed, "fox", window=window)
    return BucketOrder(plain, buckets, step_size, drop)


COUNTS = [[7], [1], [3, 3, 4], [1, 2, 30], [12, 12], [5, 0, 8], [40, 1, 1, 1]]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("step_size", [1, 4, 12])
@pytest.mark.parametrize("window", [None, 5])
def test_wrap_keeps_every_picture_and_fills_steps(
    counts: list[int], step_size: int, window: int | None
) -> None:
    order = order_of(counts, step_size, window=window)
    total = sum(counts)
    for epoch in range(3):
        places = range(epoch * order.length, (epoch + 1) * order.length)
        seen = [order.sample_at(place) for place in places]
        assert set(seen) == set(range(total))
        assert len(seen) - total == order.repeated
        assert len(seen) == sum(-(-n // step_size) for n in counts) * step_size
        for start in range(0, len(seen), step_size):
            step = seen[start : start + step_size]
            bucket = order.bucket_at(places[start])
            assert {int(order._buckets[s]) for s in step} == {bucket}
            count = counts[bucket]
            # Within a step nothing comes twice more often than it must.
            assert max(Counter(step).values()) <= -(-step_size // count)
        assert {order.epoch_of(place) for place in places} == {epoch}


def test_drop_leaves_out_tails_but_never_a_bucket() -> None:
    order = order_of([10, 3, 8], 4, drop=True)
    seen = Counter(order.sample_at(place) for place in range(order.length))
    by_bucket = Counter(int(order._buckets[s]) for s in seen)
    assert order.length == (2 + 1 + 2) * 4
    assert by_bucket == {0: 8, 1: 3, 2: 8}
    other = {order.sample_at(place) for place in range(order.length, 2 * order.length)}
    left_out = set(range(21)) - set(seen)
    assert left_out & other, "another tail is left out in the next epoch"


def test_any_entry_point_gives_the_same_sequence() -> None:
    one = order_of([9, 4, 6], 4, window=6)
    straight = [one.sample_at(place) for place in range(4 * one.length)]
    for start in (0, 1, one.length - 1, one.length, 3 * one.length + 5):
        fresh = order_of([9, 4, 6], 4, window=6)
        assert [fresh.sample_at(p) for p in range(start, len(straight))] == straight[start:]


def test_epochs_and_seeds_differ() -> None:
    one, other = order_of([50, 50], 4), order_of([50, 50], 4, seed=1)
    first = [one.sample_at(p) for p in range(one.length)]
    second = [one.sample_at(p) for p in range(one.length, 2 * one.length)]
    assert first != second
    assert first != [other.sample_at(p) for p in range(one.length)]


def test_buckets_are_spread_over_the_epoch() -> None:
    order = order_of([400, 400], 4)
    steps = [order.bucket_at(p) for p in range(0, order.length, 4)]
    halves = sum(steps[:100]), sum(steps[100:])
    assert min(halves) > 30


def test_damaged_ones_are_replaced_from_their_bucket() -> None:
    order = order_of([5, 7], 4)
    for place in range(order.length):
        stand_ins = [order.sample_at(place, tries) for tries in range(7)]
        assert {int(order._buckets[s]) for s in stand_ins} == {order.bucket_at(place)}
        count = int(order.counts[order.bucket_at(place)])
        assert len(set(stand_ins)) == count, "every picture of the bucket gets its chance"


def test_reads_stay_near_each_other() -> None:
    buckets = np.arange(10_000) % 3
    plain = SampleOrder([100] * 100, 0, "fox", window=300)
    order = BucketOrder(plain, buckets, 8)
    spans = []
    for start in range(0, order.length - 300, 300):
        shards = {order.sample_at(place) // 100 for place in range(start, start + 300)}
        spans.append(len(shards))
    assert np.mean(spans) < 12, "of 100 shards"


def test_a_million_samples_start_anywhere_soon() -> None:
    buckets = np.random.default_rng(0).integers(0, 9, size=1_000_000)
    started = time.perf_counter()
    order = BucketOrder(SampleOrder([10_000] * 100, 0, "fox", window=50_000), buckets, 256)
    order.sample_at(777_777)
    assert time.perf_counter() - started < 5.0
