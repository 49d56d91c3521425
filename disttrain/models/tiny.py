"""The embedded base model: the real classes at toy widths, built in a second without any download.

Pictures of 64 x 64 pixels, latents of 4 x 8 x 8, CLIP's real vocabulary. Invariant: its weights are
the same bits on every machine and with every library version, because each tensor is drawn by the
project's own generator under its public name; torch's random state is neither used nor changed.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from disttrain import randomness
from disttrain.files import digest_of, sha256_bytes
from disttrain.models.names import public_name
from disttrain.models.parts import BaseModel, frozen, skeleton
from disttrain.models.vocabulary import MAX_TOKENS, VOCABULARY_FILE, VOCABULARY_SIZE, clip_tokenizer

SEED = 0
RECIPE = 1  # raise it when the rule that draws the weights changes
WIDTH = 64

UNET_CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
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
VAE_CONFIG: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (64, 64, 128, 128),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    # 1 / 0.596, the standard deviation of the latents of eight photographs (people, animals,
    # things, landscapes, microscopy) resized to 64 x 64 pixels.
    "scaling_factor": 1.68,
}
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
}

# A drawn encoder knows no small variances; with a log variance of about 0 half of each latent would
# be noise. This bias gives a posterior of about 5 % standard deviation.
POSTERIOR_LOG_VARIANCE = -6.0
TOKEN_SPREAD, POSITION_SPREAD = 0.02, 0.01  # as in CLIP's own initialisation

Module = TypeVar("Module", bound=nn.Module)


def build_tiny(prediction_type: str | None = None) -> BaseModel:
    """The embedded base model, predicting "epsilon" (the default) or "v_prediction"."""
    schedule = {**SCHEDULE, "prediction_type": prediction_type or "epsilon"}
    vocabulary = sha256_bytes(VOCABULARY_FILE.read_bytes())
    recipe = {"recipe": RECIPE, "seed": SEED, "vocabulary": vocabulary}
    parts = {"unet": UNET_CONFIG, "text_encoder": TEXT_CONFIG, "vae": VAE_CONFIG}
    return BaseModel(
        name="tiny",
        family="sd1",
        tokenizer=clip_tokenizer(),
        text_encoder=drawn("text_encoder", lambda: CLIPTextModel(CLIPTextConfig(**TEXT_CONFIG))),
        unet=drawn("unet", lambda: UNet2DConditionModel(**UNET_CONFIG)),
        scheduler=DDPMScheduler(**schedule),
        pipeline_scheduler=DDIMScheduler(**schedule, set_alpha_to_one=False),
        vae_source=_tiny_vae,
        vae_config=VAE_CONFIG,
        digest=digest_of({**recipe, **parts}),
        vae_digest=digest_of({**recipe, "vae": VAE_CONFIG}),
    )


def _tiny_vae() -> AutoencoderKL:
    vae = drawn("vae", lambda: AutoencoderKL(**VAE_CONFIG))
    log_variance = vae.quant_conv.bias[VAE_CONFIG["latent_channels"] :]  # pyright: ignore
    log_variance += POSTERIOR_LOG_VARIANCE
    return vae


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
