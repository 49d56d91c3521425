"""The embedded base model's sizes, and the weights its training starts from.

Invariant: drawn weights are the same bits on every machine and with every library version, because
each tensor is drawn by the project's own generator under its public name; torch's random state is
neither used nor changed.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from disttrain import randomness
from disttrain.models.names import public_name
from disttrain.models.parts import frozen, skeleton
from disttrain.models.vocabulary import MAX_TOKENS, VOCABULARY_SIZE

SEED = 0
WIDTH = 64

UNET_CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 8,
    "out_channels": 8,
    "layers_per_block": 1,
    "block_out_channels": (64, 96, 128),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 8,  # eight heads, as in Stable Diffusion 1.x
}
TEXT_CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "projection_dim": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_TOKENS,
    "pad_token_id": VOCABULARY_SIZE - 1,
    "bos_token_id": VOCABULARY_SIZE - 2,
    "eos_token_id": VOCABULARY_SIZE - 1,
}

TOKEN_SPREAD, POSITION_SPREAD = 0.02, 0.01  # as in CLIP's own initialisation


def drawn(part: str, build: Any) -> Any:
    """A module whose weights are drawn, each by its public name within `part`."""
    module = skeleton(build)
    weights = {
        name: _draw(part, public_name(part, name), tuple(tensor.shape))
        for name, tensor in module.state_dict().items()
    }
    module.load_state_dict(weights, strict=True, assign=True)
    return frozen(module)


def _draw(part: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """One tensor: matrices and kernels of variance 1 / fan-in, scales 1, biases 0."""
    if len(shape) == 1:
        return torch.ones(shape) if name.endswith(".weight") else torch.zeros(shape)
    if name.endswith("token_embedding.weight"):
        spread = TOKEN_SPREAD
    elif name.endswith("position_embedding.weight"):
        spread = POSITION_SPREAD
    else:
        spread = 1 / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(randomness.normal(shape, SEED, ("tiny", part, name)) * spread)
