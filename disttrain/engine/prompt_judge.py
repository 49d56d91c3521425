"""Does a picture show what its prompt says? The untouched base model as the judge.

Beside `scores.py`, for machines without CLIP. A diffusion model denoises a picture better when it
is told what is on it, by as much as it believes so (Li et al. 2023, "Your Diffusion Model is
Secretly a Zero-Shot Classifier": the prompt of least error is the class). Invariant: timesteps and
noise are the same for every picture, prompt and state, so differences come from the picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from disttrain import randomness
from disttrain.methods.objective import Denoiser
from disttrain.models.base import BaseModel
from disttrain.models.packed import placed
from disttrain.models.text import ContextCache, PromptTokenizer

DRAWS = 8
"""Timesteps that a picture is looked at, evenly spread, each with its own noise."""


class PromptJudge:
    """A base model as it was before anything was taught.

    Args:
        base: must stay as it is.
    """

    def __init__(self, base: BaseModel, device: torch.device) -> None:
        self.device = device
        self.denoiser = placed(Denoiser.over(base, with_text=False), device)
        placed(base.text_encoder, device)
        self.contexts = ContextCache(PromptTokenizer(base.tokenizer), base.text_encoder)
        steps = base.scheduler.config["num_train_timesteps"]
        self.timesteps = torch.tensor(
            [int((draw + 0.5) / DRAWS * steps) for draw in range(DRAWS)], device=device
        )

    def gains(self, latents: Tensor, prompts: Sequence[str]) -> np.ndarray:
        """How much a prompt helps to denoise each picture, `[N]`, at most 1, 0 for no help.

        `mean_t 1 - error(t, prompt) / error(t, "")`. The ratio makes every timestep count alike,
        though errors differ by orders of magnitude, and takes the scale out.

        Args:
            latents: `[N, C, h, w]` of the pictures.
        """
        found = []
        for one, prompt in zip(latents, prompts, strict=True):
            told, untold = self._errors(one, prompt), self._errors(one, "")
            found.append(float((1 - told / untold.clamp(min=1e-12)).mean()))
        return np.array(found)

    @torch.no_grad()
    def _errors(self, latent: Tensor, prompt: str) -> Tensor:
        """Denoising errors `[DRAWS]` of a latent `[C, h, w]`."""
        shape = tuple(latent.shape)
        noise = np.stack(
            [randomness.normal(shape, 0, ("prompt judge", "noise"), i) for i in range(DRAWS)]
        )
        batch = {
            "latents": latent.to(self.device).expand(DRAWS, *shape),
            "noise": torch.from_numpy(noise).to(self.device),
            "timesteps": self.timesteps,
            "weights": torch.ones(DRAWS, 1, device=self.device),
            "context": self.contexts.get([prompt] * DRAWS),
        }
        return self.denoiser(batch).double().cpu()
