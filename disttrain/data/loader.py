"""From streams of samples to the rows of each micro-batch, decoded ahead by other processes.

Between `stream.py` and the batcher. Invariant: which samples a rank gets for (cursors, micro-batch)
is a function of (plan, rank, world) alone: workers only do ahead of time what would be done at the
moment, and the state of the data is one cursor a subject.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from disttrain.data.buckets import Size
from disttrain.data.stream import Sample, SampleStream
from disttrain.errors import DataError

PREFETCHED = 2  # micro-batches that each worker is ahead
_STARTED_BY = "forkserver"  # a plain fork would copy the locks of torch's and gloo's threads
Turn = tuple[tuple[int, ...], int]
"""(cursor of each subject, micro-batch)."""


def batch_positions(cursor: int, micro: int, batch_size: int, rank: int, world: int) -> range:
    """Positions of one rank's share of micro-batch `micro` of the update that starts at `cursor`.

    Micro-batches follow one another and each is cut into `world` slices, so that 2 processes with a
    batch of 2 train on what 1 process with a batch of 4 does.
    """
    start = cursor + (micro * world + rank) * batch_size
    return range(start, start + batch_size)


@dataclass(frozen=True)
class Share:
    """How updates are cut into micro-batches, and which part is this rank's."""

    batch_size: int
    accumulation: int
    rank: int
    world: int

    @property
    def step_size(self) -> int:
        """Samples of one update over all ranks."""
        return self.batch_size * self.accumulation * self.world

    def positions(self, turn: Turn, subject: int) -> range:
        """Positions of this rank's part of a subject's micro-batch."""
        cursors, micro = turn
        return batch_positions(cursors[subject], micro, self.batch_size, self.rank, self.world)

    def turns(self, first: Turn) -> Iterator[Turn]:
        """Micro-batches one after another, without end."""
        cursors, micro = first
        while True:
            yield cursors, micro
            micro += 1
            if micro == self.accumulation:
                cursors, micro = tuple(cursor + self.step_size for cursor in cursors), 0


class Rows(TypedDict):
    """The rows of one micro-batch: streams one after another, positions within each."""

    content: Tensor
    """`[R, ...]`, see `Sample.content`."""
    pictures: list[int]
    damaged: list[tuple[int, int, str]]
    """(stream, picture, reason) of what was found damaged on the way."""
    failure: str
    """Why there is no content, else empty."""


class SampleLoader:
    """Gives the rows of any micro-batch; quickest for one after another.

    Args:
        groups: the streams of each subject, its own pictures first. All rows of a micro-batch have
            the size that the first stream has at their position.
        workers: processes that work ahead; 0 reads at the moment.
        pin: put rows into page-locked memory, from which copies to a GPU run beside it.
        warn: told once of each picture that is passed over, and why.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[SampleStream]],
        share: Share,
        workers: int = 0,
        pin: bool = False,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.groups = groups
        self.streams = [stream for group in groups for stream in group]
        self.share, self.workers, self.pin, self.warn = share, workers, pin, warn
        self._told: set[tuple[int, int]] = set()
        self._reader = _Reader(groups, share)
        self._ahead: Iterator[Rows] | None = None
        self._expected: Iterator[Turn] = iter(())

    def rows(self, turn: Turn) -> tuple[list[tuple[SampleStream, Sample]], Tensor]:
        """(stream, sample) of each row, and the content of all rows `[R, ...]`.

        Raises:
            DataError: more pictures are damaged than may be, or a worker died.
        """
        rows = self._reader[turn] if not self.workers else self._next(turn)
        for number, picture, why in rows["damaged"]:
            if (number, picture) not in self._told:
                self._told.add((number, picture))
                self.warn(f"passed over: {why}")
            self.streams[number].note_damage({picture: why})
        if rows["failure"]:
            raise DataError(rows["failure"])
        places = [
            (stream, position)
            for subject, group in enumerate(self.groups)
            for stream in group
            for position in self.share.positions(turn, subject)
        ]
        found = []
        for row, (stream, position) in enumerate(places):
            picture, content = rows["pictures"][row], rows["content"][row]
            found.append((stream, Sample(position, picture, content)))
        return found, rows["content"]

    def _next(self, turn: Turn) -> Rows:
        if self._ahead is None or next(self._expected) != turn:
            self.close()
            self._expected = self.share.turns(turn)
            next(self._expected)
            self._ahead = iter(self._start(turn))
        try:
            return next(self._ahead)
        except (RuntimeError, EOFError, OSError) as error:  # how a worker's death shows
            line = str(error).split("\n", 1)[0] or type(error).__name__
            raise DataError(
                f"decoding ahead failed ({line}); run again, with data.num_workers=0 if it repeats"
            ) from error

    def _start(self, turn: Turn) -> DataLoader[Rows]:
        context = torch.multiprocessing.get_context(_STARTED_BY)
        context.set_forkserver_preload([__name__])
        # No time-out: with one, torch looks whether workers live only when it is over.
        return DataLoader(
            self._reader,
            batch_size=None,  # the reader makes whole batches itself
            sampler=_Turns(self.share, turn),
            num_workers=self.workers,
            pin_memory=self.pin,
            worker_init_fn=_begin_work,
            multiprocessing_context=context,
            prefetch_factor=PREFETCHED,
        )

    def close(self) -> None:
        """End the workers; the next call starts new ones."""
        self._ahead = None


class _Turns(Sampler[Turn]):
    def __init__(self, share: Share, first: Turn) -> None:
        self.share, self.first = share, first

    def __iter__(self) -> Iterator[Turn]:
        return self.share.turns(self.first)


class _Reader(Dataset[Rows]):
    """What one worker does: all rows of a micro-batch at once."""

    def __init__(self, groups: Sequence[Sequence[SampleStream]], share: Share) -> None:
        self.groups, self.share = groups, share

    def __getitem__(self, turn: Turn) -> Rows:
        contents: list[Tensor] = []
        pictures: list[int] = []
        damaged: list[tuple[int, int, str]] = []
        failure = ""
        try:
            for number, stream, size, positions in self._streams(turn):
                known = set(stream.damaged)
                try:
                    for position in positions:
                        sample = stream.sample(position, size)
                        contents.append(sample.content)
                        pictures.append(sample.picture)
                finally:
                    new = stream.damaged.keys() - known
                    damaged += [(number, i, stream.damaged[i]) for i in sorted(new)]
            content = default_collate(contents)  # in a worker, straight into shared memory
        except DataError as error:
            failure, content = str(error), torch.empty(0)
        return Rows(content=content, pictures=pictures, damaged=damaged, failure=failure)

    def _streams(self, turn: Turn) -> Iterator[tuple[int, SampleStream, Size, range]]:
        """(number, stream, size of its pictures, positions) in the order of rows."""
        number = 0
        for subject, group in enumerate(self.groups):
            positions = self.share.positions(turn, subject)
            size = group[0].size_at(positions[0])
            for stream in group:
                yield number, stream, size, positions
                number += 1


def _begin_work(_: int) -> None:
    """Signals go to every process of a job; the trainer alone decides when workers end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_trainer, daemon=True).start()


def _end_with_trainer() -> None:
    """End when the trainer was killed. Torch looks at the wrong parent: the server that forks."""
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    trainer.join()
    os._exit(1)
