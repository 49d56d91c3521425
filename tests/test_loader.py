"""The loader: one global sequence of samples whatever the world, workers or interruptions."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from pictures import uneven_shards, write_numbered

from disttrain.data.bucket_order import BucketOrder
from disttrain.data.buckets import assign, bucket_sizes
from disttrain.data.loader import SampleLoader, Share, Turn
from disttrain.data.order import SampleOrder
from disttrain.data.shard_source import ShardSource
from disttrain.data.shards import write_shards
from disttrain.data.source import Source, open_source
from disttrain.data.stream import DecodedPictures, SampleStream
from disttrain.errors import DataError

GLOBAL_BATCH = 12
SHARDS = (1, 7, 100)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same 130 pictures in 1, 7 and 100 shards of unequal sizes; index by number of shards."""
    folder = tmp_path_factory.mktemp("shards")
    return {number: uneven_shards(folder, 130, number) for number in SHARDS}


def stream_of(
    source: Source, step_size: int, drop: bool = False, buckets: bool = False, allowed: int = 0
) -> SampleStream:
    sizes = [(8, 8)]
    whole = step_size if drop and not buckets else 1
    order = SampleOrder(source.sizes, 3, "fox", "instance", 50, whole)
    grouped = None
    if buckets:
        sizes = bucket_sizes(16, 4, 2.0)
        grouped = BucketOrder(order, assign(source.shapes(), sizes), step_size, drop)
    pictures = DecodedPictures(source, True, True, 3, ("fox", "instance"))
    count = len(source.records)
    return SampleStream("fox", "instance", 3, count, grouped or order, pictures, sizes, allowed)


def loader_of(
    index: Path, share: Share, workers: int = 0, drop: bool = False, buckets: bool = False
) -> SampleLoader:
    stream = stream_of(open_source(index), share.step_size, drop, buckets)
    return SampleLoader([[stream]], share, workers)


def share_of(world: int, rank: int, accumulation: int = 1) -> Share:
    return Share(GLOBAL_BATCH // world // accumulation, accumulation, rank, world)


def read(loader: SampleLoader, first: Turn, steps: int) -> dict[int, tuple[int, bytes]]:
    """Picture and pixels by position, of `steps` optimizer steps from `first` on."""
    found = {}
    turns = loader.share.turns(first)
    for _ in range(steps * loader.share.accumulation):
        rows, content = loader.rows(next(turns))
        for (_, sample), pixels in zip(rows, content, strict=True):
            assert torch.equal(sample.content, pixels)
            assert sample.position not in found
            found[sample.position] = (sample.picture, pixels.numpy().tobytes())
    loader.close()
    return found


@pytest.mark.parametrize("number", SHARDS)
@pytest.mark.parametrize("buckets", [False, True])
def test_one_sequence_on_every_world(shards: dict[int, Path], number: int, buckets: bool) -> None:
    """Worlds 1 to 5 with 0 and 2 workers: the same samples, each once an epoch, equal steps."""
    alone = read(loader_of(shards[number], Share(60, 1, 0, 1), buckets=buckets), ((0,), 0), 4)
    assert sorted(alone) == list(range(240))
    if not buckets:
        assert set(Counter(picture for picture, _ in list(alone.values())[:130]).values()) == {1}
    for world in range(1, 6):
        for workers in (0, 2):
            together: dict[int, tuple[int, bytes]] = {}
            for rank in range(world):
                share = Share(60 // world, 1, rank, world)
                mine = read(
                    loader_of(shards[number], share, workers, buckets=buckets), ((0,), 0), 4
                )
                assert len(mine) == 240 // world
                assert not mine.keys() & together.keys()
                together |= mine
            assert together == alone


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_an_interruption_changes_nothing(
    shards: dict[int, Path], workers: int, accumulation: int
) -> None:
    steps = 2 * 130 // GLOBAL_BATCH + 2
    share = share_of(1, 0, accumulation)
    straight = read(loader_of(shards[7], share, workers), ((0,), 0), steps)
    epoch_end = 130 // GLOBAL_BATCH
    for step in (0, 1, 5, epoch_end, epoch_end + 1):
        rest = read(loader_of(shards[7], share, workers), ((step * GLOBAL_BATCH,), 0), steps - step)
        assert rest == {p: s for p, s in straight.items() if p >= step * GLOBAL_BATCH}


def test_going_on_with_another_world_is_the_same_sequence(shards: dict[int, Path]) -> None:
    straight = read(loader_of(shards[7], share_of(1, 0)), ((0,), 0), 8)
    begun = [read(loader_of(shards[7], share_of(4, r)), ((0,), 0), 3) for r in range(4)]
    before = {place: sample for part in begun for place, sample in part.items()}
    for world, accumulation in [(2, 2), (1, 4), (3, 1), (3, 2), (1, 1)]:
        rest: dict[int, tuple[int, bytes]] = {}
        for rank in range(world):
            share = share_of(world, rank, accumulation)
            rest |= read(loader_of(shards[7], share), ((36,), 0), 5)
        assert before | rest == straight


def test_dropping_the_tail_keeps_steps_within_an_epoch(shards: dict[int, Path]) -> None:
    loader = loader_of(shards[7], share_of(1, 0), drop=True)
    found = read(loader, ((0,), 0), 20)
    assert loader.streams[0].order.length == 120
    for start in (0, 120):
        epoch = [found[place][0] for place in range(start, start + 120)]
        assert len(set(epoch)) == 120


def test_fewer_pictures_than_ranks(tmp_path: Path) -> None:
    write_numbered(tmp_path / "pictures", range(3))
    index = write_shards(tmp_path / "pictures", tmp_path / "shards")
    for drop in (False, True):
        seen: Counter[int] = Counter()
        for rank in range(5):
            share = Share(1, 1, rank, 5)
            found = read(loader_of(index, share, drop=drop), ((0,), 0), 3)
            seen.update(picture for picture, _ in found.values())
        assert seen == {0: 5, 1: 5, 2: 5}


def test_asking_out_of_turn_gives_what_was_asked_for(shards: dict[int, Path]) -> None:
    share = share_of(1, 0)
    straight = read(loader_of(shards[7], share), ((0,), 0), 6)
    loader = loader_of(shards[7], share, workers=2)
    for cursor in (0, 12, 48, 12, 24):
        rows, _ = loader.rows(((cursor,), 0))
        assert [s.picture for _, s in rows] == [straight[cursor + i][0] for i in range(12)]
    loader.close()


def damaged_copy(index: Path, tmp_path: Path, samples: list[int]) -> Path:
    """One shard with a byte turned in some pictures, under its old index."""
    source = open_source(index)
    assert isinstance(source, ShardSource)
    tar = bytearray((index.parent / source.index.shards[0].file).read_bytes())
    for sample in samples:
        row = source.index.row(sample)
        tar[row.offset + row.size // 2] ^= 1
    (tmp_path / "shard-000000.tar").write_bytes(tar)
    (tmp_path / "index.json").write_bytes(index.read_bytes())
    return tmp_path / "index.json"


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    write_numbered(tmp_path / "pictures", range(130))
    return write_shards(tmp_path / "pictures", tmp_path / "packed")


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_pictures_are_passed_over_and_named(
    packed: Path, tmp_path: Path, workers: int
) -> None:
    bad = [4, 77]
    (tmp_path / "damaged").mkdir()
    index = damaged_copy(packed, tmp_path / "damaged", bad)
    whole = read(loader_of(packed, Share(13, 1, 0, 1)), ((0,), 0), 20)
    sequences = []
    for world in (1, 2):
        found: dict[int, tuple[int, bytes]] = {}
        for rank in range(world):
            stream = stream_of(open_source(index), 26, allowed=2)
            said: list[str] = []
            share = Share(26 // world, 1, rank, world)
            loader = SampleLoader([[stream]], share, workers, warn=said.append)
            found |= read(loader, ((0,), 0), 10)
            assert set(stream.damaged) <= set(bad)
            assert len(said) == len(stream.damaged)
            assert all("damaged" in line and "passed over" in line for line in said)
            if world == 1:
                assert set(stream.damaged) == set(bad)
        sequences.append(found)
    assert sequences[0] == sequences[1], "every rank finds the same stand-in"
    for place, (picture, pixels) in sequences[0].items():
        assert picture not in bad
        if whole[place][0] not in bad:
            assert whole[place] == (picture, pixels), "no neighbour is touched"


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_damaged_pictures_end_the_run_with_a_list(
    packed: Path, tmp_path: Path, workers: int
) -> None:
    (tmp_path / "damaged").mkdir()
    index = damaged_copy(packed, tmp_path / "damaged", [4, 50, 77])
    stream = stream_of(open_source(index), 26, allowed=2)
    loader = SampleLoader([[stream]], Share(26, 1, 0, 1), workers)
    with pytest.raises(DataError, match=r"fox: 3 of 130 pictures cannot be used \(2 may be\)"):
        read(loader, ((0,), 0), 10)
    loader.close()


def test_a_missing_shard_ends_the_run_soon(packed: Path) -> None:
    index = open_source(packed)
    (packed.parent / "shard-000000.tar").unlink()
    stream = stream_of(index, 26, allowed=1)
    started = time.monotonic()
    with pytest.raises(DataError, match="No such file"):
        read(SampleLoader([[stream]], Share(26, 1, 0, 1), 2), ((0,), 0), 1)
    assert time.monotonic() - started < 20


def test_a_worker_that_dies_is_noticed(shards: dict[int, Path]) -> None:
    loader = loader_of(shards[7], share_of(1, 0), workers=2)
    loader.rows(((0,), 0))
    processes = torch.multiprocessing.active_children()
    assert processes
    for process in processes:
        process.kill()
    started = time.monotonic()
    with pytest.raises(DataError, match="decoding ahead failed"):
        read(loader, ((12,), 0), 20)
    assert time.monotonic() - started < 30
    loader.close()
