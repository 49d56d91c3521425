"""The window of a picture that training sees: where it is cut, and how it is resized.

After `images.py`, which decodes. Invariant: a window's pixels are a function of the picture's, the
size and the place asked for; nothing is stretched beyond what whole pixels make of an aspect ratio.
"""

from __future__ import annotations

import numpy as np


def fit(
    pixels: np.ndarray,
    height: int,
    width: int,
    crop: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
) -> np.ndarray:
    """Resize so that a height x width window is covered, keeping the aspect, and cut the window.

    Args:
        pixels: uint8 [H, W, 3], or a mask [H, W].
        crop: where the window lies between top and bottom, left and right: each in [0, 1], of
            which only the direction with slack matters; (0.5, 0.5) is the centre. The window begins
            and ends at whole pixels.
        flip: mirror left to right after the cut.

    Returns:
        uint8 [height, width, 3] or [height, width], bicubic with antialiasing; not to be written
        into, as it may be a view of `pixels`.
    """
    # Here because those who only look at pictures should not wait for torch. Its resizing gives
    # what Pillow's does to within two steps of 255, several times as fast.
    import torch

    assert pixels.dtype == np.uint8
    assert height > 0
    assert width > 0
    assert 0 <= crop[0] <= 1
    assert 0 <= crop[1] <= 1
    source_height, source_width = pixels.shape[:2]
    scale = max(width / source_width, height / source_height)
    box_width = max(1, min(round(width / scale), source_width))
    box_height = max(1, min(round(height / scale), source_height))
    left = round((source_width - box_width) * crop[1])
    top = round((source_height - box_height) * crop[0])
    part = pixels[top : top + box_height, left : left + box_width]
    if part.shape[:2] != (height, width):
        plain = np.require(part, requirements=["C", "W"])  # what torch takes without a word
        planes = torch.from_numpy(plain.reshape(box_height, box_width, -1))
        resized = torch.nn.functional.interpolate(
            planes.permute(2, 0, 1)[None], (height, width), mode="bicubic", antialias=True
        )
        part = resized[0].permute(1, 2, 0).numpy().reshape(height, width, *pixels.shape[2:])
    return np.ascontiguousarray(part[:, ::-1] if flip else part)


def reduction(size: tuple[int, int], at_least: tuple[int, int]) -> int:
    """At 1/8, 1/4, 1/2 or 1/1 of its size a JPEG is decoded for a window: the 8, 4, 2 or 1.

    Both sides stay at least twice the window's, so that the resizing still has pixels to average,
    and divide without remainder: a cut last pixel would shift the picture.
    """
    for part in (8, 4, 2):
        pairs = list(zip(size, at_least, strict=True))
        if all(side % part == 0 and side // part >= 2 * least for side, least in pairs):
            return part
    return 1
