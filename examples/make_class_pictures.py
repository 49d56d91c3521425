"""Rebuilds examples/class_pictures from the Noto emoji: other members of a subject's class.

    npm pack @iconify-json/noto@1.2.9           (and unpack it)
    pip install resvg-py==0.5.0                 (draws SVG; the trainer itself does not need it)
    python examples/make_class_pictures.py NOTO_FOLDER

Prior preservation shows the model such pictures under `a photo of {class_name}`, so that the class
word keeps its meaning while the subject is taught. The pictures come from a different artist's set
than the subjects, and none of them is a subject. Nothing is downloaded; every choice is fixed.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path

import resvg_py  # pyright: ignore[reportMissingImports]
from make_subjects import background, place, save, shuffled_backgrounds
from PIL import Image

from disttrain import randomness

SIZE = (128, 128)
DRAWN_SIZE = 256
CLASSES: dict[str, tuple[str, ...]] = {
    "bird": ("bird", "dove", "duck", "eagle", "flamingo", "owl", "parrot", "rooster"),
    "animal_face": (
        "bear",
        "cat-face",
        "dog-face",
        "lion",
        "panda",
        "rabbit-face",
        "tiger-face",
        "wolf",
    ),
}


def drawing(icons: dict[str, dict[str, str]], name: str, side: int) -> Image.Image:
    """One icon as RGBA, DRAWN_SIZE pixels square; `side` is the side of the SVG's own canvas."""
    if name not in icons:
        sys.exit(f"no icon {name} in icons.json; unpack @iconify-json/noto@1.2.9")
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {side} {side}">{icons[name]["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=DRAWN_SIZE, height=DRAWN_SIZE)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def main() -> None:
    """Command line: the unpacked icon package in, a folder of pictures per class out."""
    parser = argparse.ArgumentParser(description="Rebuild the example class pictures.")
    parser.add_argument("package", type=Path, help="unpacked @iconify-json/noto")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "class_pictures")
    arguments = parser.parse_args()
    library = json.loads((arguments.package / "icons.json").read_text(encoding="utf-8"))
    for class_name, names in CLASSES.items():
        stream = ("examples", "class pictures", class_name)
        behinds = shuffled_backgrounds(stream, avoid=("grey", "forest green"))
        for number, name in enumerate(names):
            cut_out = drawing(library["icons"], name, library.get("height", 16))
            draws = randomness.generator(0, stream, number)
            picture = place(cut_out, background(SIZE, *behinds[number]), draws, most_turn=5.0)
            save(picture, arguments.output / class_name / f"{number + 1:02}.jpg")
        print(f"{arguments.output / class_name}: {len(names)} pictures")


if __name__ == "__main__":
    main()
