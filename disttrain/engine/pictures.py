"""From a subject's settings to its sample streams: pictures, latents, prompts.

Between `data/` and a pack. Invariant: `open_subject` finds everything that can be wrong with a
subject's files before anything is written; `make_streams` then only computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from disttrain.config import RunConfig, SubjectSettings
from disttrain.data.latents import LatentCache, Variants
from disttrain.data.loader import SampleStream
from disttrain.data.source import Source, open_source
from disttrain.engine.class_images import class_image_folder, given_class_images
from disttrain.engine.distributed import Mesh
from disttrain.engine.progress import Progress, join_names
from disttrain.files import digest_of
from disttrain.methods.batch import SubjectStreams
from disttrain.models.base import BaseModel
from disttrain.models.packed import placed
from disttrain.prompts import PromptPlan, prompt_plan, words_of_stem


@dataclass(frozen=True)
class SubjectData:
    """What a subject is taught from."""

    settings: SubjectSettings
    source: Source
    given_class: Source | None
    plan: PromptPlan


def open_subject(
    config: RunConfig, subject: SubjectSettings, world: int, progress: Progress
) -> SubjectData:
    """A subject's pictures and prompts, checked.

    Raises:
        DataError: a picture, caption or template is missing or unusable.
    """
    source = open_source(subject.images)
    plan = prompt_plan(config, subject)
    given = given_class_images(config, subject)
    if source.ignored:
        progress.warn(f"{subject.images}: not pictures, left out: {join_names(source.ignored)}")
    captions = sum(record.caption is not None for record in source.records)
    if captions and not plan.uses_captions:
        progress.warn(
            f"subject {subject.name}: {captions} captions are not used; "
            "put {caption} into instance_prompt, or choose a template with [filewords]"
        )
    per_step = config.data.batch_size * config.train.gradient_accumulation_steps * world
    if len(source.records) % per_step:
        progress.warn(
            f"subject {subject.name}: {len(source.records)} pictures do not divide by processes x "
            f"batch x accumulation = {per_step}; an update may hold pictures of two epochs"
        )
    return SubjectData(subject, source, given, plan)


def make_streams(
    config: RunConfig,
    mesh: Mesh,
    base: BaseModel,
    subjects: list[SubjectData],
    progress: Progress,
) -> tuple[list[SubjectStreams], dict[str, str]]:
    """Streams of each subject, and the digest of what each is taught from.

    Draws missing class pictures and encodes missing latents; the VAE is gone from memory when this
    returns. Call before a method changes the base.
    """
    class_sources: list[list[Source]] = []
    for data in subjects:
        class_sources.append(_class_sources(config, mesh, base, data, progress))
    encoder = VaeEncoder(base, mesh.device)
    streams, digests = [], {}
    for data, sources in zip(subjects, class_sources, strict=True):
        name = data.settings.name
        instance = _instance_stream(config, mesh, base, data, encoder, progress)
        prior = _class_stream(config, mesh, base, data, sources, encoder, progress)
        streams.append(SubjectStreams(instance, prior))
        digests[name] = digest_of([data.source.digest, *(source.digest for source in sources)])
    return streams, digests


class VaeEncoder:
    """Encodes pictures to moments with a VAE that is loaded at the first call."""

    def __init__(self, base: BaseModel, device: torch.device) -> None:
        self.base, self.device = base, device
        self.vae: AutoencoderKL | None = None

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Mean and log variance `[N, 2C, h, w]` of pictures `[N, 3, H, W]` in [-1, 1]."""
        if self.vae is None:
            self.vae = placed(self.base.load_vae(), self.device)
        posterior = self.vae.encode(pixels.to(self.device), return_dict=False)[0]
        return torch.cat([posterior.mean, posterior.logvar], dim=1).float().cpu()


def _class_sources(
    config: RunConfig, mesh: Mesh, base: BaseModel, data: SubjectData, progress: Progress
) -> list[Source]:
    if config.prior is None:
        return []
    sources = [data.given_class] if data.given_class is not None else []
    have = sum(len(source.records) for source in sources)
    folder = class_image_folder(config, mesh, base, data.settings, have, progress)
    return [*sources, *([open_source(folder)] if folder is not None else [])]


def _latents(
    config: RunConfig,
    mesh: Mesh,
    base: BaseModel,
    source: Source,
    encoder: Callable[[Tensor], Tensor],
    progress: Progress,
) -> LatentCache:
    random = not config.data.center_crop
    variants = Variants(
        crops=config.data.cached_crops if random else 1, random=random, flip=config.data.random_flip
    )
    cache = LatentCache(
        source,
        config.cache_folder / "latents",
        variants=variants,
        resolution=config.data.resolution,
        vae_digest=base.vae_digest,
    )
    with progress.counter(f"latents of {source.where}") as counted:
        cache.prepare(encoder, rank=mesh.rank, world=mesh.world, progress=counted)
    return cache


def _instance_stream(
    config: RunConfig,
    mesh: Mesh,
    base: BaseModel,
    data: SubjectData,
    encoder: Callable[[Tensor], Tensor],
    progress: Progress,
) -> SampleStream:
    name, records = data.settings.name, data.source.records
    cache = _latents(config, mesh, base, data.source, encoder, progress)
    captions = [
        record.caption if record.caption is not None else words_of_stem(record.stem)
        for record in records
    ]

    def prompt(position: int, picture: int) -> str:
        return data.plan.prompt(config.seed, name, position, captions[picture])

    keys = [record.key for record in records]
    return SampleStream(
        name, "instance", config.seed, keys, cache.get, cache.variants.count, prompt
    )


def _class_stream(
    config: RunConfig,
    mesh: Mesh,
    base: BaseModel,
    data: SubjectData,
    sources: list[Source],
    encoder: Callable[[Tensor], Tensor],
    progress: Progress,
) -> SampleStream | None:
    if not sources:
        return None
    assert config.prior is not None
    text = data.plan.fill(data.settings.class_prompt)
    caches = [_latents(config, mesh, base, source, encoder, progress) for source in sources]
    places = [
        (cache, i)
        for cache, source in zip(caches, sources, strict=True)
        for i in range(len(source.records))
    ][: config.prior.num_class_images]

    def moments(picture: int, variant: int) -> Tensor:
        cache, i = places[picture]
        return cache.get(i, variant)

    keys = [f"class picture {i}" for i in range(len(places))]
    variants = caches[0].variants.count
    name = data.settings.name
    return SampleStream(name, "class", config.seed, keys, moments, variants, lambda *_: text)
