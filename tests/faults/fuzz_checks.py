"""What must hold for each fuzz case: it works, or ends in one line; and what is read is right.

The kinds of cases are in `fuzz_kinds.py`; here is what they have in common. What is right is taken
from the whole originals, not from an index.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from fuzz_material import bombs, originals

from disttrain import files
from disttrain.data import images
from disttrain.data.loader import SampleLoader, Share
from disttrain.data.order import SampleOrder
from disttrain.data.plain_files import fits_a_line
from disttrain.data.shards import index_tars, verify, write_shards
from disttrain.data.source import Source, SourceOptions, allowance, open_source
from disttrain.data.stream import DecodedPictures, SampleStream
from disttrain.data.window import fit
from disttrain.errors import UserError
from disttrain.models.base import load_base
from disttrain.models.text import PromptTokenizer

SIDE = 8
LONGEST_LINE = 600
LONGEST_LIST = 4000
_Result = TypeVar("_Result")


def window(data: bytes) -> bytes:
    """What the loader must give of a whole picture: its centre, [3, SIDE, SIDE]."""
    shown = fit(images.decode(data, "original").pixels, SIDE, SIDE)
    return np.ascontiguousarray(shown.transpose(2, 0, 1)).tobytes()


@dataclass(frozen=True)
class Material:
    """What all cases start from; never written to.

    Attributes:
        windows: of whole pictures, by the digest of their file.
        shards: files of a folder of three tars with their index.
    """

    pictures: dict[str, bytes]
    bombs: dict[str, bytes]
    windows: dict[str, bytes]
    shards: dict[str, bytes]
    tokenizer: PromptTokenizer

    @staticmethod
    def make(folder: Path) -> Material:
        """Make everything, in a folder of its own."""
        pictures = originals()
        (folder / "in").mkdir(parents=True)
        for number, (name, data) in enumerate(pictures.items()):
            (folder / "in" / name).write_bytes(data)
            if number % 2:
                (folder / "in" / name).with_suffix(".txt").write_text(f"Füchse, {number}")
        write_shards(folder / "in", folder / "out", samples_per_shard=4, workers=1)
        shards = {p.name: p.read_bytes() for p in (folder / "out").glob("[!.]*")}
        windows = {files.sha256_bytes(data): window(data) for data in pictures.values()}
        tokenizer = PromptTokenizer(load_base("tiny").tokenizer)
        return Material(pictures, bombs(), windows, shards, tokenizer)


class Case:
    """One case: its folder, its draws, and what went wrong with it."""

    def __init__(self, folder: Path, draw: random.Random, material: Material) -> None:
        self.folder, self.draw, self.material = folder, draw, material
        self.inputs, self.output = folder / "in", folder / "out"
        self.failures: list[str] = []
        self.counts: Counter[str] = Counter()
        self._listed: list[tuple[str, int, int]] = []

    def fail(self, why: str) -> None:
        """Something did not hold."""
        self.failures.append(why)

    def put(self, contents: Mapping[str, bytes]) -> None:
        """Write input files."""
        for name, data in contents.items():
            (self.inputs / name).write_bytes(data)

    def seal(self) -> None:
        """From now on nothing may change the inputs."""
        self._listed = self._list()

    def compare_inputs(self) -> None:
        """Fail if the inputs are not as they were sealed."""
        if self._list() != self._listed:
            self.fail("inputs were changed")

    def _list(self) -> list[tuple[str, int, int]]:
        found = [(path, path.lstat()) for path in sorted(self.inputs.rglob("*"))]
        return [(str(path), status.st_size, status.st_mtime_ns) for path, status in found]

    def tried(self, what: str, work: Callable[[], _Result]) -> _Result | None:
        """The result of `work`, or None where it was refused as it should be."""
        try:
            result = work()
        except UserError as error:
            self.counts[f"{what} refused"] += 1
            self.check_line(what, str(error), LONGEST_LIST if what == "loading" else LONGEST_LINE)
            return None
        except Exception as error:
            self.fail(f"{what}: traceback {type(error).__name__}: {str(error)[:200]!r}")
            return None
        self.counts[f"{what} worked"] += 1
        return result

    def check_line(self, what: str, line: str, most: int = LONGEST_LINE) -> None:
        """A message must be one line that a terminal shows as it is, and name the file."""
        if not fits_a_line(line[:1000]) or len(line.splitlines()) > 1:
            self.fail(f"{what}: message of several lines or with controls: {line[:300]!r}")
        if len(line) > most:
            self.fail(f"{what}: message of {len(line)} letters: {line[:200]!r}")
        if self.folder.name not in line:
            self.fail(f"{what}: message without the file: {line[:300]!r}")

    def check_lines(self, what: str, lines: Collection[str]) -> None:
        """Every line of a list of what was left out."""
        for line in lines:
            self.check_line(what, line)


def load(
    case: Case, source: Source, bad: Collection[int] | None, share: float | None, **known: bytes
) -> None:
    """Read an epoch; compare every picture, and which ones were passed over.

    Args:
        bad: the samples that are damaged, where that is known.
        share: of the samples that may be.
        known: windows of further pictures, by the digest of their file.
    """
    count = len(source.records)
    allowed = allowance(count, share)
    order = SampleOrder(source.sizes, 3, "fox", "instance", 5)
    pictures = DecodedPictures(source, False, False, 3, ("fox", "instance"))
    sizes = [(SIDE, SIDE)]
    stream = SampleStream("fox", "instance", 3, count, order, pictures, sizes, allowed)
    said: list[str] = []
    loader = SampleLoader([[stream]], Share(4, 1, 0, 1), warn=said.append)
    windows = {**case.material.windows, **known}

    def epoch() -> bool:
        for cursor in range(0, count, 4):
            rows, _ = loader.rows(((cursor,), 0))
            for _, sample in rows:
                right = windows.get(source.records[sample.picture].digest)
                if sample.content.numpy().tobytes() != right:
                    case.fail(f"loading: altered picture {sample.picture}")
        return True

    finished = case.tried("loading", epoch)
    case.check_lines("warnings", said)
    if bad is None:
        return
    if finished and set(stream.damaged) != set(bad):
        case.fail(f"loading: passed over {sorted(stream.damaged)} instead of {sorted(bad)}")
    if bool(finished) != (len(bad) <= min(allowed, count - 1)):
        case.fail(f"loading: {len(bad)} of {count} damaged, {allowed} may be: {finished=}")
    if finished and len(said) != len(bad):
        case.fail(f"loading: {len(said)} warnings of {len(bad)} damaged pictures")


def opened(case: Case, path: Path, share: float | None = None) -> Source | None:
    """A source with a look at all its records, or None."""

    def work() -> Source:
        source = open_source(path, SourceOptions(max_damaged=share))
        assert len(source.shapes()) == len([*source.records])
        return source

    source = case.tried("opening", work)
    if source is not None:
        case.check_lines("left out", source.damaged)
    return source


def indexed(case: Case, tars: Sequence[Path], thorough: bool) -> tuple[Source, list[str]] | None:
    """The tars through an index of their own, and what was left out of it."""
    path = case.output / "made" / "index.json"
    report = case.tried("indexing", lambda: index_tars(tars, path, workers=1, thorough=thorough))
    if report is None:
        return None
    case.check_lines("skipped", report.skipped)
    if verify(path, workers=1):
        case.fail("indexing: a new index of these tars finds them damaged")
    source = opened(case, path)
    return None if source is None else (source, report.skipped)
