"""How random a windowed order is against what it reads again: a table, in about ten seconds.

    python benchmarks/order.py

A million samples in a thousand shards. For each window: how many shards a thousand samples in a row
come from; how often a shard must be fetched in an epoch when as many fit on disk as two windows
touch (1.0: once, as in reading straight through); how many of a batch's 256 samples share their
shard with another of the batch (of a full shuffle: what chance gives); and how far apart, as a part
of the epoch, two epochs place the same sample (a full shuffle: 1/3).
"""

from __future__ import annotations

import argparse
import time
from collections import OrderedDict

import numpy as np

from disttrain.data.order import SampleOrder

BATCH = 256


def fetches(shards: np.ndarray, room: int) -> int:
    """How often a shard is fetched when the `room` most recently used ones are kept."""
    kept: OrderedDict[int, None] = OrderedDict()
    count = 0
    for shard in shards.tolist():
        if shard in kept:
            kept.move_to_end(shard)
            continue
        count += 1
        kept[shard] = None
        if len(kept) > room:
            kept.popitem(last=False)
    return count


def row(window: int | None, samples: int, shards: int) -> str:
    size = samples // shards
    order = SampleOrder([size] * shards, 0, "bench", window=window)
    started = time.perf_counter()
    order.sample_at(samples * 3 + samples // 2)
    start = time.perf_counter() - started
    epochs = [order.epoch(0), order.epoch(1)]
    of_shard = epochs[0] // size
    thousands = of_shard[: samples // 1000 * 1000].reshape(-1, 1000)
    distinct = np.mean([len(np.unique(part)) for part in thousands])
    room = min(shards, 2 * -(-(window or samples) // size) + 2)
    again = fetches(of_shard, room) / shards
    batches = of_shard[: samples // BATCH * BATCH].reshape(-1, BATCH)[::10]
    company = np.mean([BATCH - (np.unique(b, return_counts=True)[1] == 1).sum() for b in batches])
    places = [np.empty(samples, dtype=np.int64) for _ in epochs]
    for place, line in zip(places, epochs, strict=True):
        place[line] = np.arange(samples)
    apart = np.abs(places[0] - places[1]).mean() / samples
    name = f"{window:,}" if window else "whole set"
    return (
        f"| {name} | {distinct:,.0f} | {room} | {again:.2f} | {company:.1f} | {apart:.3f} | "
        f"{start * 1000:.1f} ms |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=1_000)
    options = parser.parse_args()
    print("| window | shards per 1000 | shards kept | fetches | not alone of 256 | apart | start |")
    print("|---|---|---|---|---|---|---|")
    for window in (1_000, 5_000, 20_000, 50_000, None):
        print(row(window, options.samples, options.shards))


if __name__ == "__main__":
    main()
