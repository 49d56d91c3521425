"""Pictures for the data tests, made from a seed."""

import io
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from disttrain.data.shards import index_tars, write_shards


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth random uint8 pixels [height, width, channels] (2-D for one channel)."""
    shape = (height // 4 + 2, width // 4 + 2, channels)
    coarse = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    planes = [
        np.asarray(
            Image.fromarray(coarse[..., c]).resize((width, height), Image.Resampling.BICUBIC)
        )
        for c in range(channels)
    ]
    return planes[0] if channels == 1 else np.stack(planes, axis=-1)


def encoded(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """A picture file of the given kind."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int) -> Image.Exif:
    """EXIF data with an orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def make_folder(folder: Path, count: int, *, size: tuple[int, int] = (24, 32)) -> Path:
    """A folder of `count` pictures of the kinds that shards take, every second with a caption."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("JPEG", "JPEG")]
    for number in range(count):
        suffix, kind = kinds[number % len(kinds)]
        data = encoded(noise(*size, seed=number), kind)
        (folder / f"fox-{number}.{suffix}").write_bytes(data)
        if number % 2:
            (folder / f"fox-{number}.txt").write_text(f" a fox, Füchse {number}\n", "utf-8")
    return folder


def write_numbered(folder: Path, numbers: Iterable[int]) -> None:
    """Small pictures of different shapes, each other than all others, named by their number."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        height, width = 10 + 5 * (number % 3), 10 + 5 * (number // 3 % 3)
        pixels = noise(height, width, seed=1000 + number)
        (folder / f"{number:04d}.png").write_bytes(encoded(pixels))


def uneven_shards(folder: Path, count: int, shards: int) -> Path:
    """An index of `count` numbered pictures in so many tars of different sizes."""
    cuts = np.sort(np.random.default_rng(shards).choice(range(1, count), shards - 1, False))
    edges = [0, *cuts.tolist(), count]
    tars = []
    for shard, (start, end) in enumerate(itertools.pairwise(edges)):
        place = folder / f"{shards}-{shard}"
        write_numbered(place / "pictures", range(start, end))
        write_shards(place / "pictures", place / "tars", workers=1)
        tars.append(place / "tars" / "shard-000000.tar")
    index = folder / str(shards) / "index.json"
    index.parent.mkdir()
    index_tars(tars, index)
    return index
