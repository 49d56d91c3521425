"""Drawing pictures with a finished result: the `sample` command.

Reads the result files as any other program would, not the checkpoint. Invariant: a picture equals
what a stock diffusers pipeline draws from the same file, prompt and seed with its DDIM scheduler.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from disttrain.config import (
    DreamboothSettings,
    LoraSettings,
    RunConfig,
    SubjectSettings,
    TextualInversionSettings,
)
from disttrain.config_file import load_config
from disttrain.data.images import encode_png
from disttrain.engine.previews import parameters_text
from disttrain.engine.run_folder import RunFolder
from disttrain.errors import ConfigError, ModelError
from disttrain.files import write_bytes
from disttrain.formats.embedding import read_embedding
from disttrain.formats.lora import read_lora
from disttrain.models.base import BaseModel, configured_base, load_base
from disttrain.models.packed import (
    PackedLoRALinear,
    PackedTokenEmbedding,
    placed,
    replace_layer,
)
from disttrain.models.sampler import DrawSettings, decode_latents, draw_latents, to_pixels
from disttrain.models.text import PromptTokenizer, encode_ids, vocabulary_of
from disttrain.prompts import prompt_plan


@dataclass(frozen=True)
class SampleRequest:
    """What to draw."""

    prompt: str
    negative_prompt: str = ""
    subject: str = ""
    """Name of the subject; empty: the run's first."""
    step: int | None = None
    """Use the copy saved at this step; None: the final result."""
    count: int = 1
    seed: int = 0
    steps: int | None = None
    """Denoising steps; None: as the run's previews."""
    guidance_scale: float | None = None
    """None: as the run's previews."""
    size: int | None = None
    """Side in pixels; None: the run's training resolution."""


def sample(run: Path, request: SampleRequest, output: Path) -> list[Path]:
    """Draw pictures and write them as PNG files whose names are not taken yet.

    Raises:
        UserError: no such run, subject or result; impossible numbers.
    """
    if not RunFolder(run).config.is_file():
        raise ConfigError(f"{run}: no run folder (config.yaml is not in it); give one from runs/")
    config = load_config(RunFolder(run).config)
    subject = _subject(config, request.subject)
    settings = _settings(config, request)
    prompt = prompt_plan(config, subject).fill(request.prompt)
    pictures = draw(config, run, subject, prompt, request, settings)
    paths = []
    for i, pixels in enumerate(to_pixels(pictures)):
        seed = request.seed + i
        note = parameters_text(config, prompt, request.negative_prompt, seed, settings)
        path = _free_path(output, f"{subject.name}-seed{seed}")
        write_bytes(path, encode_png(pixels, {"parameters": note}))
        paths.append(path)
    return paths


@torch.no_grad()
def draw(
    config: RunConfig,
    run: Path,
    subject: SubjectSettings,
    prompt: str,
    request: SampleRequest,
    settings: DrawSettings,
) -> np.ndarray:
    """Pictures `[count, size, size, 3]` in [0, 1] from the result file of one subject."""
    base, tokenizer = load_result(config, run, subject, request.step)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unet, text_encoder = placed(base.unet, device), placed(base.text_encoder, device)
    if settings.height % base.latent_scale:
        raise ConfigError(f"--size: {settings.height} is not a multiple of {base.latent_scale}")

    def context(text: str) -> Tensor:
        ids = tokenizer.ids(text, subject.token).to(device)
        return encode_ids(text_encoder, ids[None]).expand(request.count, -1, -1)

    seeds = [request.seed + i for i in range(request.count)]
    latents = draw_latents(
        unet,
        base.pipeline_scheduler,
        context(prompt),
        context(request.negative_prompt),
        seeds,
        settings,
        base.latent_scale,
    )
    return decode_latents(placed(base.load_vae(), device), latents)


def load_result(
    config: RunConfig, run: Path, subject: SubjectSettings, step: int | None
) -> tuple[BaseModel, PromptTokenizer]:
    """The base model with a subject's result in it, and the tokenizer for its prompts.

    Raises:
        ModelError: the result is not there or does not fit the base model.
    """
    folder = run / "subjects" / subject.name
    if isinstance(config.method, DreamboothSettings):
        if step is not None:
            raise ConfigError("--step: dreambooth keeps no copy per step; leave it out")
        path = folder / "model"
        _check_exists(path, folder)
        base = load_base(str(path))
        return base, PromptTokenizer(base.tokenizer)
    stem = subject.name if step is None else f"steps/{subject.name}-{step:08d}"
    path = folder / f"{stem}.safetensors"
    _check_exists(path, folder)
    base = configured_base(config)
    if isinstance(config.method, TextualInversionSettings):
        return base, attach_embedding(base, read_embedding(path).vectors)
    assert isinstance(config.method, LoraSettings)
    attach_lora(base, path)
    return base, PromptTokenizer(base.tokenizer)


def attach_embedding(base: BaseModel, vectors: Tensor) -> PromptTokenizer:
    """Put vectors `[N, width]` behind the base's vocabulary; gives the tokenizer for them."""
    vocabulary = vocabulary_of(base.text_encoder)
    if vectors.shape[1] != vocabulary.embedding_dim:
        raise ModelError(
            f"the embedding is {vectors.shape[1]} wide, base_model {base.name} takes "
            f"{vocabulary.embedding_dim}; it was made for another kind of model"
        )
    tokenizer = PromptTokenizer(base.tokenizer, len(vectors))
    layer = PackedTokenEmbedding(vocabulary, vectors[None].clone(), tokenizer.first_id)
    base.text_encoder.set_input_embeddings(layer.requires_grad_(False))
    return tokenizer


def attach_lora(base: BaseModel, path: Path) -> None:
    """Put the low-rank changes of a file into the base's layers."""
    models = {"unet": base.unet, "text_encoder": base.text_encoder}
    names = {
        f"{part}.{name}" for part, model in models.items() for name, _ in model.named_modules()
    }
    layers, _ = read_lora(path, names)
    for full, layer in layers.items():
        part, _, name = full.partition(".")
        linear = models[part].get_submodule(name)
        if not isinstance(linear, torch.nn.Linear):
            raise ModelError(f"{path}: changes {full}, which is not a linear layer here")
        if (linear.in_features, linear.out_features) != (layer.down.shape[1], layer.up.shape[0]):
            raise ModelError(f"{path}: {full} has another shape; it was made for another model")
        packed = PackedLoRALinear(linear, layer.down[None], layer.up[None], layer.alpha)
        replace_layer(models[part], name, packed.requires_grad_(False))


def _subject(config: RunConfig, name: str) -> SubjectSettings:
    for subject in config.subjects:
        if not name or subject.name == name:
            return subject
    known = ", ".join(subject.name for subject in config.subjects)
    raise ConfigError(f"--subject: {name} is not in this run; it has {known}")


def _settings(config: RunConfig, request: SampleRequest) -> DrawSettings:
    side = config.data.resolution if request.size is None else request.size
    previews = config.train
    steps = previews.sample_steps if request.steps is None else request.steps
    scale = request.guidance_scale
    scale = previews.sample_guidance_scale if scale is None else scale
    for option, value, low in (
        ("--count", request.count, 1),
        ("--steps", steps, 1),
        ("--size", side, 8),
        ("--guidance-scale", scale, 1),
        ("--seed", request.seed, 0),
    ):
        if value < low:
            raise ConfigError(f"{option}: {value} is impossible; it must be at least {low}")
    return DrawSettings(steps, scale, side, side)


def _check_exists(path: Path, folder: Path) -> None:
    if not path.exists():
        copies = sorted((folder / "steps").glob("*.safetensors"))
        steps = ", ".join(str(int(copy.stem.rsplit("-", 1)[1])) for copy in copies)
        hint = f"there are copies at --step {steps}" if steps else "train the run to its end"
        raise ModelError(f"{path} does not exist; {hint}")


def _free_path(folder: Path, stem: str) -> Path:
    """The first name that is not taken, so that no picture is overwritten."""
    path, number = folder / f"{stem}.png", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.png"
    return path
