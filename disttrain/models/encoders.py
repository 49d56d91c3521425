"""Which encoder of pictures a setting names; between the settings and the encoders themselves.

Invariant: an encoder's packages are imported only where it is used.
"""

from __future__ import annotations

import torch

from disttrain.models.features import FeatureEncoder

OFFLINE = "effnet"
"""How a config names the encoder that comes as a package."""


def open_encoder(spec: str, device: torch.device) -> FeatureEncoder:
    """The encoder that a config or an option names.

    Args:
        spec: "effnet", or a local folder or hub id of a CLIP or DINO model.

    Raises:
        ConfigError: "effnet", but its packages are not installed.
        ModelError: a model that is missing, damaged or of another kind.
    """
    if spec == OFFLINE:
        from disttrain.models.effnet import EffNetEncoder

        return EffNetEncoder(device)
    from disttrain.models.vision import open_vision

    return open_vision(spec, device)
