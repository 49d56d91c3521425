"""Run by torchrun: every rank reads its share of shards through real workers; rank zero writes what
the world as a whole saw. Arguments: result file, then index files."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import torch.distributed as dist

from disttrain.data.loader import SampleLoader, Share
from disttrain.data.order import SampleOrder
from disttrain.data.source import open_source
from disttrain.data.stream import DecodedPictures, SampleStream

GLOBAL_BATCH = 60
STEPS = 5
WATCHDOG_SECONDS = 30


def sequence(index: Path, workers: int, share: Share) -> list[list[int]]:
    """Pictures of each step of this rank, with a collective after every step as training has."""
    source = open_source(index)
    order = SampleOrder(source.sizes, 3, "fox", "instance", 50)
    pictures = DecodedPictures(source, True, True, 3, ("fox", "instance"))
    count = len(source.records)
    stream = SampleStream("fox", "instance", 3, count, order, pictures, [(8, 8)], 0)
    loader = SampleLoader([[stream]], share, workers)
    turns = share.turns(((0,), 0))
    found = []
    for _ in range(STEPS):
        rows, _ = loader.rows(next(turns))
        everyone: list[list[int]] = [[] for _ in range(share.world)]
        dist.all_gather_object(everyone, [sample.picture for _, sample in rows])
        found.append([picture for part in everyone for picture in part])
    loader.close()
    return found


def main() -> None:
    result, *indexes = map(Path, sys.argv[1:])
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    share = Share(GLOBAL_BATCH // world, 1, rank, world)
    found = {}
    for index in indexes:
        for workers in (0, 2):
            signal.alarm(WATCHDOG_SECONDS)  # a deadlock ends the process, and torchrun the others
            found[f"{index.parent.name} shards, {workers} workers"] = sequence(
                index, workers, share
            )
    signal.alarm(0)
    if rank == 0:
        result.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
