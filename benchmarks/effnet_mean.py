"""The mean of EffNet-I's features over folders of pictures, which EffNet-I subtracts.

    python benchmarks/effnet_mean.py FOLDER ... --output disttrain/assets/effnet_mean.safetensors

Give it pictures like those that will be scored. Folders are searched with all below them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from disttrain.data.images import SUFFIXES, decode
from disttrain.data.window import fit
from disttrain.models.effnet import EffNetEncoder, write_mean


def pictures_below(folders: list[Path], side: int) -> np.ndarray:
    """Every picture in folders and below, `[N, side, side, 3]` uint8, the middle of each."""
    paths = sorted(
        path for folder in folders for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES
    )
    return np.stack([fit(decode(p.read_bytes(), str(p)).pixels, side, side) for p in paths])


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description="Make the mean that EffNet-I subtracts.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--side", type=int, default=64, help="pixels that pictures are scored at")
    options = parser.parse_args()
    pictures = pictures_below(options.folders, options.side)
    encoder = EffNetEncoder(torch.device("cpu"), mean=torch.zeros(1280))
    write_mean(options.output, encoder, pictures)
    print(f"wrote {options.output} from {len(pictures)} pictures")


if __name__ == "__main__":
    main()
