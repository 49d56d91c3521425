"""The configuration of each part of a Stable Diffusion 1.x or 2.x checkpoint, from its shapes.

Single files carry no configuration. Invariant: pure functions of names and shapes; a name they need
and do not find is a `KeyError` naming it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import CLIPTextConfig

from disttrain.models.vocabulary import MAX_TOKENS

CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
SCALING_FACTOR = 0.18215  # of every Stable Diffusion 1.x and 2.x VAE, unless the file has its own

Shapes = Mapping[str, tuple[int, ...]]


def infer_unet(shapes: Shapes) -> dict[str, Any]:
    """`UNet2DConditionModel`'s configuration from the shapes of `input_blocks` and the rest.

    Block 0 is the first convolution; then come levels of residual blocks, each level but the last
    ended by a block that only downsamples (`0.op`). 1x1 convolutions around the attention mean
    Stable Diffusion 1.x (eight heads), linear layers 2.x (heads of 64 channels).
    """
    count = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("input_blocks."))
    downsamplers = [n for n in range(count) if f"input_blocks.{n}.0.op.weight" in shapes]
    layers = (downsamplers[0] if downsamplers else count) - 1
    firsts = range(1, count, layers + 1)
    channels = [shapes[f"input_blocks.{n}.0.out_layers.3.weight"][0] for n in firsts]
    attends = [f"input_blocks.{n}.1.norm.weight" in shapes for n in firsts]
    context = next(size for name, size in shapes.items() if name.endswith("attn2.to_k.weight"))
    linear = len(shapes["middle_block.1.proj_in.weight"]) == 2
    return {
        "sample_size": 64,
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "layers_per_block": layers,
        "block_out_channels": tuple(channels),
        "down_block_types": tuple(
            "CrossAttnDownBlock2D" if found else "DownBlock2D" for found in attends
        ),
        "up_block_types": tuple(
            "CrossAttnUpBlock2D" if found else "UpBlock2D" for found in reversed(attends)
        ),
        "cross_attention_dim": context[1],
        "attention_head_dim": tuple(width // 64 for width in channels) if linear else 8,
        "use_linear_projection": linear,
        "upcast_attention": linear,
    }


def infer_vae(shapes: Shapes, scaling_factor: torch.Tensor | None = None) -> dict[str, Any]:
    """`AutoencoderKL`'s configuration from shapes; the scaling factor if the file stores one."""
    levels = _count(shapes, r"encoder\.down\.(\d+)\.")
    moments = shapes["quant_conv.weight"][0]
    return {
        "sample_size": 512,
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": moments // 2,
        "layers_per_block": _count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        "block_out_channels": tuple(
            shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(levels)
        ),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "scaling_factor": SCALING_FACTOR if scaling_factor is None else float(scaling_factor),
    }


def infer_text_encoder(shapes: Shapes) -> tuple[CLIPTextConfig, bool]:
    """`CLIPTextModel`'s configuration, and whether the file has OpenCLIP's names (2.x).

    Heads are 64 wide in every CLIP that Stable Diffusion uses; the floor of four is the embedded
    base's. Of OpenCLIP's 24 layers the 2.x models use the first 23.
    """
    is_open_clip = any(name.startswith(OPEN_CLIP) for name in shapes)
    if is_open_clip:
        found = below(shapes, OPEN_CLIP)
        words, positions = found["token_embedding.weight"], found["positional_embedding"]
        hidden = found["transformer.resblocks.0.mlp.c_fc.weight"][0]
        layers = min(23, _count(found, r"transformer\.resblocks\.(\d+)\."))
    else:
        found = {name.removeprefix("text_model."): s for name, s in below(shapes, CLIP).items()}
        words = found["embeddings.token_embedding.weight"]
        positions = found["embeddings.position_embedding.weight"]
        hidden = found["encoder.layers.0.mlp.fc1.weight"][0]
        layers = _count(found, r"encoder\.layers\.(\d+)\.")
    size, width = words
    config = CLIPTextConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=hidden,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=max(4, width // 64),
        max_position_embeddings=min(MAX_TOKENS, positions[0]),
        hidden_act="gelu" if is_open_clip else "quick_gelu",
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=0 if is_open_clip else size - 1,
    )
    return config, is_open_clip


def _count(shapes: Shapes, pattern: str) -> int:
    """How many numbers `pattern` finds in the names; KeyError when none."""
    found = {match.group(1) for name in shapes if (match := re.match(pattern, name))}
    if not found:
        raise KeyError(pattern.replace("\\", "").replace("(d+)", "0"))
    return len(found)


def below(shapes: Shapes, prefix: str) -> Shapes:
    """The entries under a prefix, without it; KeyError when there are none."""
    found = {n.removeprefix(prefix): size for n, size in shapes.items() if n.startswith(prefix)}
    if not found:
        raise KeyError(prefix + "*")
    return found
