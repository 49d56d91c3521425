"""Whether the embedded base model draws what its captions say: `make tiny-base-check`.

    python examples/tiny_base/check.py PICTURES [--model tiny] [--output build/tiny_base/check]

Draws 200 captions of its training set, chosen by the recipe's seed, and finds for each drawing the
nearest of the 200 true pictures by EffNet-I features. A model that knew nothing would be right for
one in 200. Writes `check.json` and `grid.png`: true pictures and drawings under each other.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from disttrain import randomness
from disttrain.data.images import decode, encode_png, tile
from disttrain.files import write_bytes, write_json
from disttrain.models.base import BaseModel, load_base
from disttrain.models.effnet import EffNetEncoder
from disttrain.models.sampler import DrawSettings, decode_latents, draw_latents, to_pixels
from disttrain.models.text import PromptTokenizer, encode_ids

COUNT = 200
NEEDED = 0.40  # share whose nearest picture is the right one
SETTINGS = {"steps": 20, "guidance_scale": 3.0, "height": 64, "width": 64}
BATCH = 20
SHOWN = 40


def draw_captions(base: BaseModel, captions: list[str]) -> np.ndarray:
    """A drawing of each caption, `[N, 64, 64, 3]`, uint8; drawing number i has seed i."""
    tokenizer, vae = PromptTokenizer(base.tokenizer), base.load_vae()

    def context(texts: list[str]) -> Tensor:
        ids = torch.stack([tokenizer.ids(text, "") for text in texts])
        return encode_ids(base.text_encoder, ids)

    found = []
    for start in range(0, len(captions), BATCH):
        texts = captions[start : start + BATCH]
        with torch.no_grad():
            latents = draw_latents(
                base.unet,
                base.pipeline_scheduler,
                context(texts),
                context([""] * len(texts)),
                list(range(start, start + len(texts))),
                DrawSettings(**SETTINGS),
                base.latent_scale,
            )
        found.append(to_pixels(decode_latents(vae, latents)))
        print(f"drew {start + len(texts)}/{len(captions)}", file=sys.stderr, flush=True)
    return np.concatenate(found)


def main() -> None:
    """Command line: pictures and a model in, a figure and a grid out; exit code 1 if too low."""
    parser = argparse.ArgumentParser(description="How well the embedded base draws its captions.")
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--output", type=Path, default=Path("build/tiny_base/check"))
    arguments = parser.parse_args()
    paths = sorted(arguments.pictures.glob("*.png"))
    order = randomness.permutation(len(paths), 0, ("tiny base", "check"))
    chosen = [paths[number] for number in order[:COUNT]]
    captions = [path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in chosen]
    true = np.stack([decode(path.read_bytes(), str(path)).pixels for path in chosen])
    drawn = draw_captions(load_base(arguments.model), captions)
    encoder = EffNetEncoder(torch.device("cpu"))
    likeness = encoder.encode(drawn) @ encoder.encode(true).T
    right = likeness.argmax(axis=1) == np.arange(COUNT)
    on_white = np.array(["-white" in path.name for path in chosen])
    report = {
        "captions": COUNT,
        "nearest_is_right": float(right.mean()),
        "nearest_is_right_on_white": float(right[on_white].mean()),
        "nearest_is_right_on_backgrounds": float(right[~on_white].mean()),
        "chance": 1 / COUNT,
        "needed": NEEDED,
        "likeness_to_own_picture": float(likeness.diagonal().mean()),
        "likeness_to_others": float((likeness.sum() - likeness.trace()) / (COUNT * (COUNT - 1))),
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for start in range(0, SHOWN, 10):
        rows += [list(true[start : start + 10]), list(drawn[start : start + 10])]
    labels = ["picture", "drawn"] * (SHOWN // 10)
    write_bytes(arguments.output / "grid.png", encode_png(tile(rows, row_labels=labels)))
    write_json(arguments.output / "check.json", report)
    for name, value in report.items():
        print(f"{name}: {value}")
    sys.exit(0 if report["nearest_is_right"] >= NEEDED else 1)


if __name__ == "__main__":
    main()
