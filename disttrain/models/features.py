"""Pictures to points on a sphere, where near means alike: what scores compare pictures by.

Between drawn pictures and `engine/scores.py`. Invariant: a picture's features depend on that
picture and the encoder alone, and have length 1, so a dot product is a cosine.

The protocol, and what its kinds share. They are told apart by name because their numbers cannot be
compared: `EffNet-I` (`effnet.py`, works offline), `CLIP-I` and `DINO` (`vision.py`, the measures of
Ruiz et al. 2022); `encoders.py` opens the one that is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

TOGETHER = 16
"""Pictures that pass through an encoder at once, to bound the memory."""


class FeatureEncoder(Protocol):
    """One way to turn pictures into features."""

    @property
    def name(self) -> str:
        """What numbers made with it are called: EffNet-I, CLIP-I or DINO."""
        ...

    def encode(self, pictures: np.ndarray) -> np.ndarray:
        """Features `[N, D]`, float32 of length 1, of pictures `[N, H, W, 3]`, uint8."""
        ...


@runtime_checkable
class TextEncoder(Protocol):
    """A feature encoder whose space holds texts too."""

    text_name: str
    """What a cosine of picture and text is called: CLIP-T."""

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """Features `[N, D]`, float32 of length 1."""
        ...


@dataclass(frozen=True)
class Preparation:
    """How an encoder wants its pictures.

    The short side is resized to `shorter` pixels, the middle `side` x `side` of that is kept, and
    each channel, in [0, 1], becomes `(value - mean) / spread`.
    """

    shorter: int
    side: int
    mean: tuple[float, float, float]
    spread: tuple[float, float, float]

    def apply(self, pictures: np.ndarray) -> Tensor:
        """Pictures `[N, H, W, 3]`, uint8, as `[N, 3, side, side]`, float32.

        Resized bicubically with antialiasing and rounded to whole steps, as these encoders' own
        preparation does.
        """
        assert pictures.dtype == np.uint8
        assert pictures.ndim == 4
        _, height, width, _ = pictures.shape
        scale = self.shorter / min(height, width)
        size = (max(self.side, round(height * scale)), max(self.side, round(width * scale)))
        planes = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2)
        if size != (height, width):
            planes = torch.nn.functional.interpolate(planes, size, mode="bicubic", antialias=True)
        top, left = (size[0] - self.side) // 2, (size[1] - self.side) // 2
        window = planes[:, :, top : top + self.side, left : left + self.side].float() / 255
        mean, spread = (torch.tensor(v).view(1, 3, 1, 1) for v in (self.mean, self.spread))
        return (window - mean) / spread


def unit_length(features: Tensor) -> np.ndarray:
    """Rows of `[N, D]` scaled to length 1, float32; a row of zeros stays."""
    return torch.nn.functional.normalize(features.detach().float(), dim=1).cpu().numpy()


def batches(pictures: np.ndarray) -> list[np.ndarray]:
    """Pictures in portions that an encoder takes at once."""
    return [pictures[i : i + TOGETHER] for i in range(0, len(pictures), TOGETHER)]
