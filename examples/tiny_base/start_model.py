"""Third step of the embedded base model: the model that its training starts from.

    python examples/tiny_base/start_model.py AUTOENCODER START

START becomes a diffusers folder: the autoencoder of the step before, and a UNet and a text encoder
with drawn weights. Invariant: the same autoencoder gives the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from parts import TEXT_CONFIG, UNET_CONFIG, drawn
from transformers import CLIPTextConfig, CLIPTextModel

from disttrain.models.parts import BaseModel
from disttrain.models.single_file import SCHEDULE
from disttrain.models.vocabulary import clip_tokenizer

PREDICTION = {"prediction_type": "v_prediction"}
"""Velocity (Salimans and Ho 2022): where noise hides the picture, its error still counts."""


def start_model(autoencoder: Path) -> BaseModel:
    """The model before its first step."""
    load: Any = AutoencoderKL.from_pretrained
    vae = load(autoencoder, local_files_only=True)
    return BaseModel(
        name="start of the tiny base",
        family="sd1",
        tokenizer=clip_tokenizer(),
        text_encoder=drawn("text_encoder", lambda: CLIPTextModel(CLIPTextConfig(**TEXT_CONFIG))),
        unet=drawn("unet", lambda: UNet2DConditionModel(**UNET_CONFIG)),
        scheduler=DDPMScheduler(**SCHEDULE, **PREDICTION),
        pipeline_scheduler=DDIMScheduler(**SCHEDULE, **PREDICTION, set_alpha_to_one=False),
        vae_source=lambda: vae,
        vae_config=dict(vae.config),
        digest="",
        vae_digest="",
    )


def main() -> None:
    """Command line: an autoencoder in, a diffusers folder out."""
    parser = argparse.ArgumentParser(description="The model that the embedded base starts from.")
    parser.add_argument("autoencoder", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    start_model(arguments.autoencoder).save(arguments.output)
    print(f"{arguments.output}: written")


if __name__ == "__main__":
    main()
