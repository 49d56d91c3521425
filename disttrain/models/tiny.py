"""The embedded base model: a small Stable Diffusion that comes with the package and can draw.

Pictures of 64 x 64 pixels, latents of 8 x 8 x 8, CLIP's real vocabulary; `examples/tiny_base` is
its recipe and says what it learned from. Invariant: it is a diffusers folder like any other, and
everything is done with it in the same way.
"""

from __future__ import annotations

from pathlib import Path

from disttrain.models.folder import load_folder
from disttrain.models.parts import BaseModel

TINY_BASE = Path(__file__).parent.parent / "assets" / "tiny_base"
"""A diffusers folder in half precision."""


def load_tiny(prediction_type: str | None = None) -> BaseModel:
    """The embedded base model; it predicts the velocity unless told otherwise."""
    return load_folder(TINY_BASE, "tiny", prediction_type)
