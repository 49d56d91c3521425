"""The basis that EffNet-I's features are whitened with, and what it is good for.

    python benchmarks/effnet_basis.py PICTURES --judge
    python benchmarks/effnet_basis.py PICTURES --output disttrain/assets/effnet_basis.safetensors

PICTURES is `build/tiny_base/pictures/noto` as `make tiny-base` draws it: of each thing a picture on
white, and one turned and scaled on another background. `--judge` fits the basis to one half of the
things and asks of the other half how often a picture's nearest one is the same thing in the other
picture. The example subjects are not among them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from disttrain.data.images import decode
from disttrain.models.effnet import WIDTHS, Basis, EffNetEncoder, fit_basis, write_basis

RANK = 128
FIRST, SECOND = "-white.png", "-placed.png"

Averages = dict[str, Tensor]


def averages_of(encoder: EffNetEncoder, paths: list[Path]) -> Averages:
    """Each layer's averages of picture files, `[N, W]`."""
    return encoder.averages(np.stack([decode(p.read_bytes(), str(p)).pixels for p in paths]))


def found_again(first: Tensor, second: Tensor) -> float:
    """Share of features `[N, D]` whose nearest in the other set is the one of the same number."""
    likeness, own = first @ second.T, torch.arange(len(first))
    right = [(likeness.argmax(way) == own).float().mean() for way in (0, 1)]
    return float(sum(right) / 2)


def judge(first: Averages, second: Averages) -> None:
    """Print how often a thing is found again: whitened, and with only the mean subtracted."""
    half = len(first["last"]) // 2
    ways: dict[str, list[tuple[Tensor, Tensor]]] = {"centred": [], "whitened": []}
    for layer, width in WIDTHS.items():
        seen = torch.cat([first[layer][:half], second[layer][:half]])
        plain = Basis(seen.mean(0), torch.eye(width))
        for way, basis in (("centred", plain), ("whitened", fit_basis(seen, RANK))):
            sides = (basis.whiten(side[layer][half:]) for side in (first, second))
            ways[way].append((next(sides), next(sides)))
    for way, layers in ways.items():
        parts = zip(*layers, strict=True)
        both = [functional.normalize(torch.cat(side, 1)) for side in parts]
        print(f"{way}: last layer {found_again(*layers[-1]):.3f}, both {found_again(*both):.3f}")


def main() -> None:
    """Write the file, or judge."""
    parser = argparse.ArgumentParser(description="Make the basis that EffNet-I is whitened with.")
    parser.add_argument("pictures", type=Path)
    parser.add_argument(
        "--judge", action="store_true", help="print how often things are found again"
    )
    parser.add_argument("--output", type=Path, help="safetensors file")
    options = parser.parse_args()
    encoder = EffNetEncoder(torch.device("cpu"), basis={})
    white = sorted(options.pictures.glob(f"*{FIRST}"))
    pairs = [(p, p.with_name(p.name.removesuffix(FIRST) + SECOND)) for p in white]
    pairs = [pair for pair in pairs if pair[1].is_file()]
    first, second = (averages_of(encoder, list(side)) for side in zip(*pairs, strict=True))
    if options.judge:
        judge(first, second)
    if options.output:
        basis = {
            layer: fit_basis(torch.cat([first[layer], second[layer]]), RANK) for layer in WIDTHS
        }
        write_basis(options.output, basis, 2 * len(pairs))
        print(f"wrote {options.output} from {2 * len(pairs)} pictures")


if __name__ == "__main__":
    main()
