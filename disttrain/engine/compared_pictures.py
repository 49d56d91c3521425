"""The pictures of a subject that drawn ones are compared with, and how pictures are drawn for it.

Between `data/` and `scores.py`. Invariant: which pictures, and what is in them, depends on the
settings and the files alone, so every state of a subject is held against the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from disttrain.config import RunConfig
from disttrain.data.images import decode
from disttrain.data.source import open_source, source_options
from disttrain.data.window import fit
from disttrain.errors import ConfigError
from disttrain.models.base import BaseModel
from disttrain.models.sampler import DrawSettings, through_autoencoder

MOST_COMPARED = 64
"""Pictures of the subject that drawn ones are compared with; of more, as many spread evenly."""


@dataclass(frozen=True)
class Against:
    """The pictures that drawn ones are compared with."""

    held_out: bool
    """False: no others were given, so these are the training pictures."""
    place: str
    pictures: int
    digest: str


def draw_settings(member: RunConfig, base: BaseModel) -> DrawSettings:
    """How pictures are drawn for scores: at the size that was trained."""
    side, score = member.data.resolution, member.score
    if side % base.latent_scale:
        raise ConfigError(f"data.resolution: {side} is not a multiple of {base.latent_scale}")
    return DrawSettings(score.steps, score.guidance_scale, side, side)


def spread_evenly(count: int, most: int) -> list[int]:
    """At most `most` numbers from 0 to `count - 1`, rising, the first and the last among them."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()


def as_base_keeps(member: RunConfig, pictures: np.ndarray, vae: AutoencoderKL) -> np.ndarray:
    """The pictures `[M, H, W, 3]` that likeness is measured to, as score.through_autoencoder says:
    what a base cannot draw at all is no fault of what it was taught."""
    return through_autoencoder(vae, pictures) if member.score.through_autoencoder else pictures


def compared_pictures(member: RunConfig) -> tuple[Against, np.ndarray]:
    """The pictures of the subject to compare with, `[M, side, side, 3]` uint8.

    Cut and resized as training pictures are (the middle of each).

    Raises:
        DataError: there is none, or one cannot be read.
    """
    (subject,) = member.subjects
    place = subject.held_out or subject.images
    source = open_source(place, source_options(member))
    count, side = len(source.records), member.data.resolution
    pictures = []
    for number in spread_evenly(count, MOST_COMPARED):
        where = f"{source.where}: {source.records[number].key}"
        picture = decode(source.read(number), where, at_least=(side, side))
        pictures.append(fit(picture.pixels, side, side))
    against = Against(bool(subject.held_out), place, len(pictures), source.digest)
    return against, np.stack(pictures)
