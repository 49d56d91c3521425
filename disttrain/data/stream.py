"""The endless sequence of one subject's pictures, each as what training reads: latents or pixels.

Between the order and the loader. Invariant: the sample at a position is a function of (seed,
subject, position, files) alone. Where a file is damaged, the next whole sample of its epoch stands
in, which every rank and every run finds alike, because damage is a property of the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from disttrain import randomness
from disttrain.data import images
from disttrain.data.buckets import Size
from disttrain.data.latents import LatentCache
from disttrain.data.order import Order
from disttrain.data.samples import refuse_too_many
from disttrain.data.source import Source
from disttrain.data.window import fit
from disttrain.errors import DataError


@dataclass(frozen=True)
class Sample:
    """One training picture as the objective needs it."""

    position: int
    """Draw index: how many samples of its stream came before it."""
    picture: int
    """Number of the picture in its source."""
    content: Tensor
    """Moments `[2C, h, w]` (mean and log variance of the autoencoder's posterior), floating, or
    pixels `[3, H, W]`, uint8."""


class DamagedPicture(DataError):
    """A picture that cannot be read or decoded, for which another may stand in."""


class Pictures(Protocol):
    """What a stream's samples are made of."""

    def content(self, picture: int, size: Size, position: int) -> Tensor:
        """The picture at a size, as the draw at `position` shows it (crop, mirroring).

        Raises:
            DamagedPicture: it cannot be shown.
        """
        ...


class CachedLatents:
    """Moments from the cache; a draw chooses among the cached crops and mirrorings.

    Args:
        caches: by size; prepared.
    """

    def __init__(
        self, caches: Mapping[Size, LatentCache], seed: int, stream: tuple[str, str]
    ) -> None:
        self._caches, self._seed, self._stream = caches, seed, (*stream, "variant")

    def content(self, picture: int, size: Size, position: int) -> Tensor:
        """Moments of the picture, see `Pictures`."""
        cache = self._caches[size]
        variant = randomness.integer(cache.variants.count, self._seed, self._stream, position)
        return cache.get(picture, variant)


class DecodedPictures:
    """Pixels, decoded when they are asked for; crop and mirroring are drawn afresh each time."""

    def __init__(
        self,
        source: Source,
        random_crop: bool,
        random_flip: bool,
        seed: int,
        stream: tuple[str, str],
    ) -> None:
        self._source, self._crop, self._flip = source, random_crop, random_flip
        self._seed, self._stream = seed, (*stream, "window")

    def content(self, picture: int, size: Size, position: int) -> Tensor:
        """Pixels of the picture, see `Pictures`."""
        try:
            data = self._source.read(picture)
        except DataError as error:
            raise DamagedPicture(str(error)) from error
        try:
            pixels = images.decode(data, "", at_least=size).pixels
        except DataError as error:  # only now its name, which costs a look into the index
            where = f"{self._source.where}: {self._source.records[picture].key}"
            raise DamagedPicture(f"{where}{error}") from error
        draws = randomness.generator(self._seed, self._stream, position).random(3)
        crop = (float(draws[0]), float(draws[1])) if self._crop else (0.5, 0.5)
        flip = bool(self._flip and draws[2] < 0.5)
        shown = fit(pixels, *size, crop, flip)
        return torch.from_numpy(np.ascontiguousarray(shown.transpose(2, 0, 1)))


class SampleStream:
    """The samples of one subject's pictures, or of its class pictures, by position.

    Args:
        name: "instance" or "class"; with seed and subject it keys every draw.
        count: how many pictures there are.
        sizes: of the buckets by number; one for pictures of one size.
        allowed: how many pictures may be damaged.
    """

    def __init__(
        self,
        subject: str,
        name: str,
        seed: int,
        count: int,
        order: Order,
        pictures: Pictures,
        sizes: Sequence[Size],
        allowed: int,
    ) -> None:
        self.subject, self.name, self.seed, self.count = subject, name, seed, count
        self.order, self.pictures, self.sizes, self.allowed = order, pictures, sizes, allowed
        self.damaged: dict[int, str] = {}
        """Reason by picture; pictures that were found damaged are not looked at again."""

    def size_at(self, position: int) -> Size:
        """Height and width of the sample at `position`."""
        return self.sizes[self.order.bucket_at(position)]

    def sample(self, position: int, size: Size) -> Sample:
        """The sample at `position`, counted over all epochs.

        Raises:
            DataError: more pictures are damaged than may be.
        """
        tries = 0
        while True:
            picture = self.order.sample_at(position, tries)
            if picture not in self.damaged:
                try:
                    content = self.pictures.content(picture, size, position)
                    return Sample(position, picture, content)
                except DamagedPicture as error:
                    self.note_damage({picture: str(error)})
            tries += 1

    def note_damage(self, found: Mapping[int, str]) -> None:
        """Pass these pictures over from now on.

        Raises:
            DataError: more pictures are damaged than may be.
        """
        self.damaged.update(found)
        refuse_too_many(self.subject, list(self.damaged.values()), self.allowed, self.count)

    def epoch_of(self, position: int) -> int:
        """How many epochs lie before `position`."""
        return self.order.epoch_of(position)
