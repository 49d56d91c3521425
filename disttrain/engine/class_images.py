"""Class pictures for prior preservation: those a person gave, the rest drawn by the base model.

Drawn once for a (base model, prompt, settings) and kept in the cache, so that subjects of one class
and later runs share them. Invariant: picture i is a function of its seed alone, so any number of
processes draw the same set; each file appears whole.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from disttrain.config import RunConfig, SubjectSettings
from disttrain.data.images import encode_png
from disttrain.data.source import Source, open_source, source_options
from disttrain.engine.distributed import Mesh
from disttrain.engine.progress import Progress
from disttrain.errors import DataError
from disttrain.files import digest_of, write_bytes
from disttrain.models.base import BaseModel
from disttrain.models.packed import placed
from disttrain.models.sampler import DrawSettings, decode_latents, draw_latents, to_pixels
from disttrain.models.text import ContextCache, PromptTokenizer
from disttrain.prompts import prompt_plan

DRAWN_TOGETHER = 4


def given_class_images(config: RunConfig, subject: SubjectSettings) -> Source | None:
    """The class pictures a person gave, or None; checked before anything is written.

    Raises:
        DataError: the folder holds no picture, or one that cannot be read.
    """
    if not subject.class_images:
        return None
    return open_source(subject.class_images, source_options(config))


def class_images_lock(config: RunConfig, subject: SubjectSettings) -> Path:
    """Lock file of a class's pictures, for workers that do not draw them together."""
    prompt = prompt_plan(config, subject).fill(subject.class_prompt)
    return config.cache_folder / "class_images" / f".{digest_of(prompt)[:24]}.lock"


def class_image_folder(
    config: RunConfig,
    mesh: Mesh,
    base: BaseModel,
    subject: SubjectSettings,
    have: int,
    progress: Progress,
) -> Path | None:
    """A folder with the class pictures that are still missing, drawn now if need be.

    Ranks draw every world-th picture; nobody draws one that is there. Must run before a method
    changes the base.
    """
    prior = config.prior
    assert prior is not None
    missing = prior.num_class_images - have
    if missing <= 0:
        return None
    prompt = prompt_plan(config, subject).fill(subject.class_prompt)
    side = config.data.resolution
    draw = DrawSettings(prior.class_infer_steps, prior.class_guidance_scale, side, side)
    recipe = [base.digest, prompt, draw.steps, draw.guidance_scale, side, missing, config.seed]
    folder = config.cache_folder / "class_images" / digest_of(recipe)[:24]
    absent = [i for i in range(missing) if not (folder / f"{i:05d}.png").exists()]
    own = absent[mesh.rank :: mesh.world]
    if absent and mesh.is_main:
        progress.say(f"drawing {len(absent)} class pictures of '{prompt}' into {folder}")
    if own:
        with progress.counter("class pictures") as count:
            _draw(base, mesh, prompt, draw, folder, own, config.seed, count)
    mesh.barrier()
    return folder


def _draw(
    base: BaseModel,
    mesh: Mesh,
    prompt: str,
    settings: DrawSettings,
    folder: Path,
    numbers: list[int],
    seed: int,
    count: Callable[[int, int], None],
) -> None:
    placed(base.unet, mesh.device)
    placed(base.text_encoder, mesh.device)
    vae = placed(base.load_vae(), mesh.device)
    contexts = ContextCache(PromptTokenizer(base.tokenizer), base.text_encoder)
    for begin in range(0, len(numbers), DRAWN_TOGETHER):
        chosen = numbers[begin:][:DRAWN_TOGETHER]
        context = contexts.get([prompt] * len(chosen))
        negative = contexts.get([""] * len(chosen))
        latents = draw_latents(
            base.unet,
            base.pipeline_scheduler,
            context,
            negative,
            [seed * 100_003 + number for number in chosen],
            settings,
            base.latent_scale,
        )
        if not torch.isfinite(latents).all():
            raise DataError(f"class pictures of '{prompt}' are not finite; check base_model")
        for number, pixels in zip(chosen, to_pixels(decode_latents(vae, latents)), strict=True):
            write_bytes(folder / f"{number:05d}.png", encode_png(pixels, {"prompt": prompt}))
        count(begin + len(chosen), len(numbers))
