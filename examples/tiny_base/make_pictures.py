"""First step of the embedded base model: a folder of captioned 64-pixel pictures.

    npm pack @iconify-json/noto@1.2.9 @iconify-json/twemoji@1.2.5 emojibase-data@17.0.0
    (unpack each archive into a folder of its own; `make tiny-base` does)
    pip install resvg-py==0.5.0
    python examples/tiny_base/make_pictures.py NOTO TWEMOJI EMOJIBASE PICTURES

Each drawing gives two pictures: one on white, and one turned, scaled and moved on a background like
those of the example subjects. A caption is its name, its kind and what is behind it: `owl, bird` or
`owl, bird, cream stripes behind it`. The example subjects' names are held out, so that the subjects
are new to the model; so are repetitions of one drawing in several skin tones, and flags, of which
there are too many. Each artist's pictures are in a folder of their own: the autoencoder learns from
all, the model from Noto alone, so that it has one style.

Invariant: the same packages give the same pixels.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from make_class_pictures import drawing
from make_subjects import SUBJECTS, background, place, shuffled_backgrounds

from disttrain import randomness

SIDE = 64
MARGIN = 3  # pixels around a drawing on white
LARGEST_TURN = 10.0  # degrees, as of the example subjects
HELD_OUT = tuple(subject.name for subject in SUBJECTS)
LEFT_OUT = re.compile(r"skin-tone|^flag-|" + "|".join(HELD_OUT))
KINDS = {"animal-mammal": "animal", "animal-marine": "sea animal", "transport-ground": "vehicle"}
"""What a kind is called, where its name in the list of emoji would not be said."""


@dataclass(frozen=True)
class Drawing:
    """One icon of one artist's set."""

    name: str
    """As the package spells it: "red-apple"."""
    kind: str
    artist: str


def kinds_of(emojibase: Path) -> dict[str, str]:
    """The kind of each emoji by its name: `owl` -> `bird`."""
    groups = json.loads((emojibase / "meta/groups.json").read_text(encoding="utf-8"))
    subgroups: dict[str, str] = groups["subgroups"]
    kinds = {}
    for emoji in json.loads((emojibase / "en/data.json").read_text(encoding="utf-8")):
        subgroup = subgroups.get(str(emoji.get("subgroup")), "")
        shorter = re.sub(r"^(animal|plant|food|transport)-", "", subgroup)
        kinds[slug(emoji["label"])] = KINDS.get(subgroup, shorter.replace("-", " "))
    return kinds


def slug(label: str) -> str:
    """A name as icon packages spell it: small letters and dashes."""
    return "-".join(re.findall(r"[a-z0-9]+", label.lower().replace("\u2019", "")))


def drawings(library: dict[str, Any], kinds: dict[str, str]) -> Iterator[Drawing]:
    """The drawings of one icon package that are used, in the order of their names."""
    for name in sorted(library["icons"]):
        if not LEFT_OUT.search(name):
            yield Drawing(name, kinds.get(name, ""), library["prefix"])


def caption(found: Drawing, behind: str) -> str:
    """The tags that are known of a picture, the most telling first."""
    name = found.name.replace("-", " ")
    kind = "" if found.kind == name else found.kind
    return ", ".join(tag for tag in (name, kind, behind) if tag)


def on_white(cut_out: Image.Image) -> Image.Image:
    """The drawing upright in the middle of a white picture."""
    inner = SIDE - 2 * MARGIN
    small = cut_out.resize((inner, inner), Image.Resampling.LANCZOS)
    picture = Image.new("RGB", (SIDE, SIDE), (255, 255, 255))
    picture.paste(small, (MARGIN, MARGIN), small)
    return picture


def on_background(cut_out: Image.Image, found: Drawing) -> tuple[Image.Image, str]:
    """The drawing turned, scaled and moved on a background; and the background's words."""
    stream = ("tiny base", found.artist, found.name)
    pattern, colour = shuffled_backgrounds(stream, avoid=())[0]
    large = background((2 * SIDE, 2 * SIDE), pattern, colour)
    draws = randomness.generator(0, (*stream, "place"), 0)
    placed = place(cut_out, large, draws, LARGEST_TURN)
    small = placed.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return small, pattern.format(colour)


def write(folder: Path, stem: str, picture: Image.Image, text: str) -> None:
    """A picture and its caption under one stem."""
    picture.save(folder / f"{stem}.png")
    (folder / f"{stem}.txt").write_text(text + "\n", encoding="utf-8", newline="\n")


def main() -> None:
    """Command line: unpacked packages in, pictures with captions out."""
    parser = argparse.ArgumentParser(description="Draw the pictures of the embedded base model.")
    parser.add_argument("packages", nargs="+", type=Path, help="unpacked icon packages")
    parser.add_argument("emojibase", type=Path, help="unpacked emojibase-data")
    parser.add_argument("output", type=Path, help="folder for the pictures")
    arguments = parser.parse_args()
    kinds = kinds_of(arguments.emojibase)
    for package in arguments.packages:
        library = json.loads((package / "icons.json").read_text(encoding="utf-8"))
        folder = arguments.output / library["prefix"]
        folder.mkdir(parents=True, exist_ok=True)
        count = 0
        for found in drawings(library, kinds):
            cut_out = drawing(library["icons"], found.name, library.get("height", 16))
            if cut_out.getchannel("A").getbbox() is None:
                continue
            stem = f"{found.name}-{found.artist}"
            write(folder, f"{stem}-white", on_white(cut_out), caption(found, ""))
            picture, behind = on_background(cut_out, found)
            write(folder, f"{stem}-placed", picture, caption(found, behind))
            count += 1
        print(f"{package.name}: {count} drawings, {2 * count} pictures", flush=True)


if __name__ == "__main__":
    main()
