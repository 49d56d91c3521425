"""A model state that draws for scores: prompts and seeds in, pictures and their latents out.

Between a model that holds a subject and `scores.py`. Invariant: a picture depends on the model, its
prompt and its seed alone, so two states are told apart by what they learned and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from disttrain.errors import ModelError
from disttrain.models.base import BaseModel
from disttrain.models.packed import placed
from disttrain.models.sampler import DrawSettings, decode_latents, draw_latents, to_pixels
from disttrain.models.text import PromptTokenizer, encode_ids

DRAWN_TOGETHER = 4

Ask = tuple[str, int]
"""A prompt and a seed."""


def each_with_each(prompts: Sequence[str], pictures: int, seed: int) -> list[Ask]:
    """`pictures` of each prompt, prompt by prompt; each prompt has the seeds from `seed` on."""
    return [(prompt, seed + number) for prompt in prompts for number in range(pictures)]


@dataclass(frozen=True)
class Drawn:
    """Pictures `[N, H, W, 3]`, uint8, and the latents `[N, C, h, w]`, float32, behind them."""

    pictures: np.ndarray
    latents: Tensor


class Artist:
    """Draws with the parts of a model as they are when it is asked.

    Args:
        tokenizer: for the prompts; it knows the new ids where a word has its own.
        new_word: the word that stands for new ids, or nothing.
        vae: of a base that was asked before, to load it once; None loads it.
    """

    def __init__(
        self,
        base: BaseModel,
        tokenizer: PromptTokenizer,
        new_word: str,
        settings: DrawSettings,
        device: torch.device,
        vae: AutoencoderKL | None = None,
    ) -> None:
        self.base, self.tokenizer, self.new_word = base, tokenizer, new_word
        self.settings, self.device = settings, device
        for part in (base.unet, base.text_encoder):
            placed(part, device)
        self.vae = placed(base.load_vae() if vae is None else vae, device)

    @torch.no_grad()
    def context(self, prompts: Sequence[str]) -> Tensor:
        """What the UNet attends to for each prompt, `[N, length, width]`."""
        ids = [self.tokenizer.ids(prompt, self.new_word) for prompt in prompts]
        return encode_ids(self.base.text_encoder, torch.stack(ids).to(self.device))

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Drawn:
        """One picture for each pair of prompt and seed; at least one.

        Raises:
            ModelError: the model draws numbers that are not finite.
        """
        pictures, found = [], []
        for begin in range(0, len(prompts), DRAWN_TOGETHER):
            chosen = list(prompts[begin:][:DRAWN_TOGETHER])
            latents = draw_latents(
                self.base.unet,
                self.base.pipeline_scheduler,
                self.context(chosen),
                self.context([""] * len(chosen)),
                list(seeds[begin:][:DRAWN_TOGETHER]),
                self.settings,
                self.base.latent_scale,
            )
            if not bool(latents.isfinite().all()):
                raise ModelError(f"'{chosen[0]}' draws numbers that are not finite; it diverged")
            pictures.append(to_pixels(decode_latents(self.vae, latents)))
            found.append(latents.float())
        return Drawn(np.concatenate(pictures), torch.cat(found))
