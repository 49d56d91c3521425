"""Defects planted on purpose: a fuzz run that does not notice them proves nothing."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from disttrain.data import folder, metadata, shard_source, shards, stream, tar_samples, tars
from disttrain.data.stream import DamagedPicture, DecodedPictures, SampleStream
from disttrain.errors import DataError


def trusting(stack: ExitStack) -> None:
    """Shards are read without comparing digests."""

    def part(self: Any, index: int, row: Any, offset: int, size: int, digest: str) -> bytes:
        try:
            return self._read(self.index.shard_of(index), offset, size)
        except OSError as error:
            raise DataError(f"{self.where}: {error.strerror}") from error

    stack.enter_context(patch.object(shard_source.ShardSource, "_part", part))


def swallowing(stack: ExitStack) -> None:
    """Whatever goes wrong while a picture is loaded is passed over in silence."""
    whole = DecodedPictures.content

    def content(self: Any, picture: int, size: tuple[int, int], position: int) -> Tensor:
        try:
            return whole(self, picture, size, position)
        except DamagedPicture:
            return torch.zeros(3, *size, dtype=torch.uint8)

    stack.enter_context(patch.object(stream.DecodedPictures, "content", content))


def lenient(stack: ExitStack) -> None:
    """Damage is noted but never too much."""

    def note(self: SampleStream, found: Mapping[int, str]) -> None:
        self.damaged.update(found)

    stack.enter_context(patch.object(stream.SampleStream, "note_damage", note))


def unbounded(stack: ExitStack) -> None:
    """Files are read whole, whatever they are."""

    def read(path: Path, limit: int) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error

    for module in (folder, metadata, shards):
        stack.enter_context(patch.object(module, "read_bounded", read))


def losing(stack: ExitStack) -> None:
    """Tars are walked by the standard library, which takes damage for the end."""

    def walk(handle: Any, where: str, wanted: Callable[[str, int], bool]) -> Iterator[tars.Member]:
        try:
            with tarfile.open(fileobj=handle, mode="r|", ignore_zeros=True) as tar:
                for info in tar:
                    file = tar.extractfile(info)
                    if file is not None:
                        data = file.read()
                        yield tars.Member(info.name, info.offset_data, info.size, data)
        except (tarfile.TarError, OSError) as error:
            raise DataError(f"{where}: not a tar") from error

    stack.enter_context(patch.object(tar_samples.tars, "walk", walk))


TWINS = {
    trusting: "altered picture",
    swallowing: "altered picture",
    lenient: "may be: finished=True",
    unbounded: "memory: ",
    losing: "whole pictures lost",
}
"""What each must be noticed by."""
