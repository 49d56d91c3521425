"""The denoising objective: noise, timesteps, target and the per-subject loss.

Invariant: `draw` is a function of (seed, subject, draw index) alone, and the loss of a subject is a
function of its own rows of the batch alone; summing the `[S]` losses therefore gives each subject
the gradient it would have had in a pack of one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor, nn
from transformers import CLIPTextModel

from disttrain import randomness
from disttrain.models.parts import BaseModel
from disttrain.models.text import encode_ids


@dataclass(frozen=True)
class Draws:
    """What one training sample needs from chance; each `[C, h, w]` or a number."""

    posterior: np.ndarray
    noise: np.ndarray
    timestep: int


def draw(
    shape: tuple[int, ...], timesteps: int, seed: int, subject: str, stream: str, index: int
) -> Draws:
    """The draws of sample `index` of a subject's stream ("instance" or "class").

    One generator per sample, read in a fixed order: posterior sample, noise, timestep. Timesteps
    are uniform over `{0, ..., timesteps - 1}` (Ho et al. 2020).
    """
    source = randomness.generator(seed, (subject, stream, "denoising"), index)
    posterior = source.standard_normal(shape, dtype=np.float32)
    noise = source.standard_normal(shape, dtype=np.float32)
    return Draws(posterior, noise, int(source.integers(timesteps)))


def posterior_sample(moments: Tensor, draws: Tensor) -> Tensor:
    """A sample of the autoencoder's diagonal Gaussian (Kingma and Welling 2014).

    Args:
        moments: `[..., 2C, h, w]`, mean and log variance.
        draws: `[..., C, h, w]`, standard normal; zeros give the mean.
    """
    mean, log_variance = moments.chunk(2, dim=-3)
    return mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * draws


class Denoiser(nn.Module):
    """UNet and, where prompts are encoded inside the step, text encoder: the module that trains.

    `forward` takes the batch of `loader` and gives the losses `[S]`:
    `sum_i weight_i * mean((prediction_i - target_i)**2)` over the rows i of each subject, where the
    target is the noise (Ho et al. 2020, eq. 14) or the velocity
    `sqrt(a) * noise - sqrt(1 - a) * latent` (Salimans and Ho 2022).

    Batch, R rows subject-major: latents, noise `[R, C, h, w]`; timesteps `[R]`; weights
    `[S, R / S]`; and either context `[R, length, width]` or ids `[R, length]`.
    """

    alphas_cumprod: Tensor

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel | None,
        scheduler: DDPMScheduler,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder
        self.predicts_velocity = scheduler.config["prediction_type"] == "v_prediction"
        self.register_buffer("alphas_cumprod", scheduler.alphas_cumprod, persistent=False)

    @classmethod
    def over(cls, base: BaseModel, with_text: bool) -> Denoiser:
        """Over a base model's parts; with its text encoder where prompts are encoded inside."""
        return cls(base.unet, base.text_encoder if with_text else None, base.scheduler)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        latents, noise, timesteps = batch["latents"], batch["noise"], batch["timesteps"]
        kept = self.alphas_cumprod.to(latents.dtype)[timesteps].view(-1, 1, 1, 1)
        noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
        if self.text_encoder is None:
            context = batch["context"]
        else:
            context = encode_ids(self.text_encoder, batch["ids"])
        dtype = self.unet.dtype
        inputs = (noisy.to(dtype), timesteps, context.to(dtype))
        predicted = self.unet(*inputs, return_dict=False)[0]
        target = noise
        if self.predicts_velocity:
            target = kept.sqrt() * noise - (1 - kept).sqrt() * latents
        error = (predicted.to(target.dtype) - target).pow(2).mean(dim=(1, 2, 3))
        return (error.view(batch["weights"].shape) * batch["weights"]).sum(dim=1)
