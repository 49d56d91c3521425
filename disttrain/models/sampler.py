"""Drawing pictures with the parts at hand: previews, class pictures and the `sample` command.

Invariant: with the same weights, prompt and seed the pictures equal those of a stock diffusers
Stable Diffusion pipeline with its DDIM scheduler (Song et al. 2021, eta 0) to rounding. Works on
a pack: pictures are subject-major, each subject drawing as many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from disttrain import randomness


@dataclass(frozen=True)
class DrawSettings:
    """How pictures are drawn."""

    steps: int
    guidance_scale: float
    height: int
    width: int


@torch.no_grad()
def draw_latents(
    unet: UNet2DConditionModel,
    scheduler: Any,
    context: Tensor,
    negative: Tensor,
    seeds: list[int],
    settings: DrawSettings,
    latent_scale: int,
) -> Tensor:
    """Denoised latents `[N, C, h, w]` of N pictures.

    Args:
        scheduler: the model's own sampler; its noise schedule and edge settings are taken over.
        context: `[N, length, width]` of the prompts.
        negative: `[N, length, width]` of the negative prompts.
        seeds: one per picture; a picture depends on its own only.
        latent_scale: pixels per latent.
    """
    ddim: Any = DDIMScheduler.from_config(scheduler.config)
    ddim.set_timesteps(settings.steps, device=context.device)
    shape = (
        unet.config["in_channels"],
        settings.height // latent_scale,
        settings.width // latent_scale,
    )
    start = torch.stack([randomness.initial_latents(shape, seed) for seed in seeds])
    latents = start.to(context.device, context.dtype) * ddim.init_noise_sigma
    guided = settings.guidance_scale > 1
    both = torch.stack([negative, context], dim=1).flatten(0, 1) if guided else context
    for timestep in ddim.timesteps:
        copies = latents.repeat_interleave(2, dim=0) if guided else latents
        scaled = ddim.scale_model_input(copies, timestep)
        predicted = unet(scaled, timestep, both, return_dict=False)[0]
        if guided:
            without, with_prompt = predicted.unflatten(0, (-1, 2)).unbind(1)
            predicted = without + settings.guidance_scale * (with_prompt - without)
        latents = ddim.step(predicted, timestep, latents, return_dict=False)[0]
    return latents


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor) -> np.ndarray:
    """Pictures `[N, H, W, 3]` in [0, 1], float32, decoded one at a time to bound the memory."""
    pictures = []
    for latent in latents:
        scaled = (latent / vae.config["scaling_factor"])[None].to(vae.device, vae.dtype)
        decoded = vae.decode(scaled, return_dict=False)[0][0]
        pictures.append((decoded / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).float().cpu().numpy())
    return np.stack(pictures)


def to_pixels(pictures: np.ndarray) -> np.ndarray:
    """Pictures in [0, 1] as uint8."""
    return (pictures * 255).round().astype(np.uint8)


@torch.no_grad()
def through_autoencoder(vae: AutoencoderKL, pictures: np.ndarray) -> np.ndarray:
    """What an autoencoder keeps of pictures `[N, H, W, 3]`, uint8: the best that a model which
    draws by it can do. The same shape and type."""
    kept = []
    for picture in pictures:
        pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 127.5 - 1
        latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()  # pyright: ignore
        kept.append(decode_latents(vae, latents * vae.config["scaling_factor"]))
    return to_pixels(np.concatenate(kept)) if kept else pictures
