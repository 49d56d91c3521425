"""A single-file checkpoint (`.safetensors` or `.ckpt`, original key names) becomes a `BaseModel`.

Works without a network: the configurations are inferred from names and shapes, the weights are
renamed by diffusers' own converters, the vocabulary is CLIP's. Invariant: every weight of every
part comes from the file; one that is missing or of another shape is an error.

What a UNet predicts cannot be seen in its weights. The rule, first match wins: the caller's wish
(`base_prediction_type`), the file's own `modelspec.prediction_type` metadata, a tensor named
`v_pred`; then epsilon for Stable Diffusion 1.x and for the 2.0 base model at 512 pixels (recognised
by the 875,000 training steps in its `.ckpt`), and v_prediction for any other 2.x. The last case is
an assumption and is told in `BaseModel.notes`; it is wrong for other 512-pixel 2.x files, which
want `base_prediction_type: epsilon`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.loaders import single_file_utils as converters
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from disttrain.errors import ModelError
from disttrain.models.folder import SUPPORTED
from disttrain.models.foreign import read_pickled, read_safetensors
from disttrain.models.infer import (
    OPEN_CLIP,
    Shapes,
    below,
    infer_text_encoder,
    infer_unet,
    infer_vae,
)
from disttrain.models.loading import one_line, quiet_libraries, weights_digest
from disttrain.models.names import local_name
from disttrain.models.parts import BaseModel, frozen, skeleton
from disttrain.models.vocabulary import clip_tokenizer

SIZE_LIMIT = 16 * 2**30
UNET, VAE = "model.diffusion_model.", "first_stage_model."
PARTS = (UNET, VAE, "cond_stage_model.")
EXTRAS = ("global_step", "scale_factor", "v_pred")
STEPS_OF_SD2_BASE = 875_000
# A single file has none with it; these are the numbers of Stable Diffusion 1.x and 2.x.
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
}
OTHER_FAMILIES = {
    "SDXL": "conditioner.embedders.",
    "SD3": "joint_blocks.",
    "Flux": "double_blocks.",
}
NOT_A_CHECKPOINT = {
    "a LoRA": ("lora_unet_", "lora_te_", "unet.", "lora_A.weight"),
    "a VAE": ("encoder.conv_in.weight",),
    "a part of a diffusers folder": ("down_blocks.0.resnets.0.norm1.weight",),
}

Tensors = dict[str, torch.Tensor]
Module = TypeVar("Module", bound=nn.Module)


@dataclass
class Checkpoint:
    """What was read of a file: the chosen tensors, the names of all, and safetensors metadata."""

    tensors: Tensors
    names: set[str]
    metadata: dict[str, str]


def load_single_file(path: Path, prediction_type: str | None = None) -> BaseModel:
    """The model in a `.safetensors` or `.ckpt` file of original Stable Diffusion key names.

    Args:
        prediction_type: "epsilon" or "v_prediction"; None applies the rule in the module docstring.

    Raises:
        ModelError: damaged, incomplete, or not a Stable Diffusion 1.x or 2.x checkpoint.
    """
    found = _read(path, (*PARTS, *EXTRAS))
    tensors = found.tensors
    _check_kind(path, found.names)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        unet_shapes = below(shapes, UNET)
        vae_config = infer_vae(below(shapes, VAE), tensors.get("scale_factor"))
        _check_unet(path, unet_shapes, vae_config["latent_channels"])
        _check_vae(path, vae_config["block_out_channels"])
        unet_config = infer_unet(unet_shapes)
        text_config, is_open_clip = infer_text_encoder(shapes)
    except (KeyError, IndexError, StopIteration) as error:
        raise ModelError(
            f"{path}: not a complete checkpoint, it lacks {one_line(error)}"
        ) from error
    family = "sd2" if is_open_clip else "sd1"
    predicted, notes = _prediction(path, family, found, prediction_type)
    if family == "sd2" and predicted == "v_prediction":
        unet_config["sample_size"] = 96
    schedule = {**SCHEDULE, "prediction_type": predicted}
    return BaseModel(
        name=path.stem,
        family=family,
        tokenizer=clip_tokenizer("!") if is_open_clip else clip_tokenizer(),
        text_encoder=_text_encoder(path, tensors, text_config, is_open_clip),
        unet=_unet(path, tensors, unet_config),
        scheduler=DDPMScheduler(**schedule),
        pipeline_scheduler=DDIMScheduler(**schedule, set_alpha_to_one=False),
        vae_source=lambda: _vae(path, _read(path, (VAE,)).tensors, vae_config),
        vae_config=vae_config,
        digest=weights_digest([("checkpoint", path)]),
        vae_digest=weights_digest([("checkpoint", path)]),
        notes=notes,
    )


def _check_kind(path: Path, names: Collection[str]) -> None:
    for family, mark in OTHER_FAMILIES.items():
        if any(mark in name for name in names):
            raise ModelError(f"{path}: {family} is not supported yet: {SUPPORTED}")
    if any(name.startswith(UNET) for name in names):
        return
    for kind, marks in NOT_A_CHECKPOINT.items():
        if any(mark in name for name in names for mark in marks):
            raise ModelError(f"{path}: this is {kind}, not a complete checkpoint")
    raise ModelError(f"{path}: not a Stable Diffusion checkpoint (it has no {UNET}* weights)")


def _check_vae(path: Path, widths: Collection[int]) -> None:
    """Such files do not tell in how many groups an autoencoder normalises; Stable Diffusion: 32."""
    if any(width % 32 for width in widths):
        raise ModelError(
            f"{path}: its autoencoder has {min(widths)} channels, no multiple of 32; "
            "give the diffusers folder it came from"
        )


def _check_unet(path: Path, shapes: Shapes, latent_channels: int) -> None:
    channels = shapes["input_blocks.0.0.weight"][1]
    if channels != latent_channels:
        raise ModelError(
            f"{path}: its UNet takes {channels} channels (inpainting or editing), which is not"
            " supported yet; use the text-to-image model it came from"
        )
    if any(name.startswith("label_emb.") for name in shapes):
        raise ModelError(f"{path}: a UNet with class labels is not supported: {SUPPORTED}")


def _prediction(
    path: Path, family: str, found: Checkpoint, wish: str | None
) -> tuple[str, tuple[str, ...]]:
    """What the UNet predicts by the rule in the module docstring, and what to tell about it."""
    if wish is not None:
        return wish, ()
    stated = found.metadata.get("modelspec.prediction_type", "")
    if stated in ("v", "v_prediction") or "v_pred" in found.names:
        return "v_prediction", ()
    if stated == "epsilon" or family == "sd1":
        return "epsilon", ()
    steps = found.tensors.get("global_step")
    if steps is not None and steps.numel() == 1 and int(steps) == STEPS_OF_SD2_BASE:
        return "epsilon", ()
    return "v_prediction", (
        f"{path.name} does not say what it predicts; v_prediction is assumed, as for the 768-pixel"
        " 2.x models. For a 512-pixel 2.x model set base_prediction_type: epsilon",
    )


def _load(path: Path, part: str, module: Module, weights: Tensors) -> Module:
    """`module` filled with `weights`, every one of which must be there and fit."""
    expected = module.state_dict()
    for name, tensor in expected.items():
        if name not in weights:
            raise ModelError(f"{path}: its {part} lacks {name}")
        if weights[name].shape != tensor.shape:
            sizes = f"{tuple(weights[name].shape)}, not {tuple(tensor.shape)}"
            raise ModelError(f"{path}: in its {part} {name} has shape {sizes}")
    chosen = {name: weights[name].float().contiguous() for name in expected}
    module.load_state_dict(chosen, strict=True, assign=True)
    return frozen(module)


def _unet(path: Path, tensors: Tensors, config: dict[str, Any]) -> UNet2DConditionModel:
    module = skeleton(lambda: UNet2DConditionModel(**config))
    with quiet_libraries():
        weights = converters.convert_ldm_unet_checkpoint(tensors, config)
    return _load(path, "UNet", module, weights)


def _vae(path: Path, tensors: Tensors, config: dict[str, Any]) -> AutoencoderKL:
    module = skeleton(lambda: AutoencoderKL(**config))
    return _load(path, "VAE", module, converters.convert_ldm_vae_checkpoint(tensors, config))


def _text_encoder(
    path: Path, tensors: Tensors, config: CLIPTextConfig, is_open_clip: bool
) -> CLIPTextModel:
    module = skeleton(lambda: CLIPTextModel(config))
    if is_open_clip:
        # The converter cuts joined projections by the first size of this matrix, if there is one.
        plain = {n: t for n, t in tensors.items() if n != OPEN_CLIP + "text_projection"}
        found = converters.convert_open_clip_checkpoint(module, plain, OPEN_CLIP)
    else:
        found = converters.convert_ldm_clip_checkpoint(tensors)
    weights = {local_name(module, name): tensor for name, tensor in found.items()}
    positions = local_name(module, "embeddings.position_embedding.weight")
    if positions in weights:
        weights[positions] = weights[positions][: config.max_position_embeddings]
    return _load(path, "text encoder", module, weights)


def _read(path: Path, prefixes: tuple[str, ...]) -> Checkpoint:
    """The tensors whose names start with one of `prefixes`, all names, and the metadata."""
    if path.suffix == ".safetensors":
        return Checkpoint(*read_safetensors(path, prefixes))
    found = read_pickled(path, SIZE_LIMIT)
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        steps = found.get("global_step")
        found = dict(found["state_dict"])
        if isinstance(steps, int):
            found["global_step"] = torch.tensor(steps)
    if not isinstance(found, dict):
        raise ModelError(f"{path}: holds no dictionary of weights")
    tensors = {str(n): value for n, value in found.items() if isinstance(value, torch.Tensor)}
    chosen = {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}
    return Checkpoint(chosen, set(tensors), {})
