"""From opened subjects to the streams a pack trains on: class pictures, latents, prompts.

Between `pictures.py` and a pack. Invariant: call before a method changes the base; afterwards
everything that can be computed once is in the caches, by all ranks together and without a
collective that waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from disttrain.config import RunConfig
from disttrain.data.buckets import Size
from disttrain.data.joined import JoinedSource
from disttrain.data.latents import MEMORY_LIMIT, LatentCache, Variants
from disttrain.data.order import SampleOrder
from disttrain.data.samples import refuse_too_many
from disttrain.data.source import Source, open_source
from disttrain.data.stream import CachedLatents, DecodedPictures, Pictures, SampleStream
from disttrain.engine.class_images import class_image_folder
from disttrain.engine.distributed import Mesh
from disttrain.engine.pictures import SubjectData, allowed_damage
from disttrain.engine.progress import Progress, join_names
from disttrain.files import digest_of
from disttrain.methods.batch import SubjectStreams
from disttrain.models.base import BaseModel
from disttrain.models.packed import placed


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
        return torch.cat([posterior.mean, posterior.logvar], dim=1).float()


class StreamMaker:
    """Makes the streams of subjects over one base.

    Args:
        together: subjects whose latents are in memory at a time; they share it equally.

    Attributes:
        encoder: the VAE, which pixels need while training; caches have used it already.
        encoded: pictures that this rank encoded because no cache had them.
    """

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        base: BaseModel,
        progress: Progress,
        together: int,
    ) -> None:
        self.config, self.mesh, self.base, self.progress = config, mesh, base, progress
        self.encoder = VaeEncoder(base, mesh.device)
        self.encoded = 0
        streams_of_each = 1 if config.prior is None else 2
        self.memory_of_stream = MEMORY_LIMIT // (streams_of_each * together)

    def make(self, subjects: Sequence[SubjectData]) -> tuple[list[SubjectStreams], dict[str, str]]:
        """Streams of each subject, and the digest of what each is taught from.

        Draws missing class pictures and encodes missing latents.
        """
        # All class pictures before any latents: the UNet and the VAE take turns in memory.
        classes = [self._class_source(data) for data in subjects]
        streams, digests = [], {}
        for data, class_source in zip(subjects, classes, strict=True):
            instance = self._stream(data, "instance", data.source)
            prior = None
            if class_source is not None:
                prior = self._stream(data, "class", class_source)
            streams.append(_with_prompts(data, instance, prior))
            digests[data.settings.name] = digest_of(
                [data.source.digest, *([class_source.digest] if class_source else [])]
            )
        return streams, digests

    def _class_source(self, data: SubjectData) -> Source | None:
        prior = self.config.prior
        if prior is None:
            return None
        given = [data.given_class] if data.given_class is not None else []
        have = sum(len(source.records) for source in given)
        folder = class_image_folder(
            self.config, self.mesh, self.base, data.settings, have, self.progress
        )
        parts = [*given, *([open_source(folder)] if folder is not None else [])]
        return JoinedSource(parts, prior.num_class_images)

    def _stream(self, data: SubjectData, name: str, source: Source) -> SampleStream:
        config = data.config
        subject, seed, step_size = data.settings.name, config.seed, config.data.global_batch_size
        assert step_size is not None, "settle_batch fills it"
        own = name == "instance"
        order = (
            data.order(step_size) if own else SampleOrder(len(source.records), seed, subject, name)
        )
        damaged: dict[int, str] = {}
        if config.data.cache_latents:
            # Class pictures come at the size of the subject's pictures beside them.
            caches = {
                size: self._cache(data, source, size, _members(data, number) if own else None)
                for number, size in enumerate(data.sizes)
            }
            # Normally the same on all ranks; a read that failed in passing would make them differ.
            for found in self.mesh.gather([cache.damaged for cache in caches.values()]):
                damaged |= dict(sorted((i, why) for part in found for i, why in part.items()))
            pictures: Pictures = CachedLatents(caches, seed, (subject, name))
        else:
            settings = config.data
            pictures = DecodedPictures(
                source, not settings.center_crop, settings.random_flip, seed, (subject, name)
            )
        allowed = allowed_damage(config, source)
        if damaged:
            refuse_too_many(subject, list(damaged.values()), allowed, len(source.records))
            self.progress.warn(
                f"passed over {len(damaged)} damaged pictures: {join_names(damaged.values())}"
            )
        count = len(source.records)
        stream = SampleStream(subject, name, seed, count, order, pictures, data.sizes, allowed)
        stream.damaged.update(damaged)
        return stream

    def _cache(
        self, subject: SubjectData, source: Source, size: Size, samples: list[int] | None
    ) -> LatentCache:
        data = subject.config.data
        random = not data.center_crop
        crops = data.cached_crops if random else 1
        cache = LatentCache(
            source,
            self.config.cache_folder / "latents",
            variants=Variants(crops=crops, random=random, flip=data.random_flip),
            resolution=size,
            vae_digest=self.base.vae_digest,
            precision=data.latent_precision,
            samples=samples,
            memory_limit=self.memory_of_stream // len(subject.sizes),
            allowed=allowed_damage(subject.config, source),
        )
        threads = 2 if data.num_workers is None else data.num_workers
        with self.progress.counter(f"latents of {source.where}") as counted:
            self.encoded += cache.prepare(
                self.encoder,
                rank=self.mesh.rank,
                world=self.mesh.world,
                threads=threads,
                progress=counted,
            )
        return cache


def _members(data: SubjectData, bucket: int) -> list[int] | None:
    """Pictures of a bucket; None for all."""
    if data.buckets is None:
        return None
    return (data.buckets == bucket).nonzero()[0].tolist()


def _with_prompts(
    data: SubjectData, instance: SampleStream, prior: SampleStream | None
) -> SubjectStreams:
    config, name = data.config, data.settings.name
    class_text = data.plan.fill(data.settings.class_prompt)

    def prompt(position: int, picture: int) -> str:
        return data.plan.prompt(config.seed, name, position, data.caption(picture))

    if prior is None or config.prior is None:
        return SubjectStreams(instance, prompt)
    weight = config.prior.prior_loss_weight
    return SubjectStreams(instance, prompt, prior, lambda *_: class_text, weight)
