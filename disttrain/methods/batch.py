"""From rows of samples to the tensors of one step.

Between `data/loader.py` (rows of a rank) and the denoiser. Invariant: rows are subject-major, a
subject's own pictures first, its class pictures after them; noise and timesteps come from each
sample's draw index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from disttrain.config import RunConfig
from disttrain.data.loader import SampleLoader, Share
from disttrain.data.stream import Sample, SampleStream
from disttrain.methods.base import Method
from disttrain.methods.objective import draw, posterior_sample
from disttrain.models.base import BaseModel
from disttrain.models.text import ContextCache

Encode = Callable[[Tensor], Tensor]
"""Pictures `[N, 3, H, W]` in [-1, 1] -> moments `[N, 2C, h, w]`."""
Prompt = Callable[[int, int], str]
"""(position, picture) -> prompt."""


@dataclass(frozen=True)
class SubjectStreams:
    """Where the samples of one subject come from, and the prompts that go with them."""

    instance: SampleStream
    instance_prompt: Prompt
    prior: SampleStream | None = None
    prior_prompt: Prompt | None = None
    prior_weight: float = 0.0
    """Weight of the class pictures' loss."""

    @property
    def streams(self) -> list[SampleStream]:
        """The subject's streams in the order of rows."""
        return [self.instance, *([self.prior] if self.prior is not None else [])]


class Batcher:
    """Makes the batch of any (cursors, micro-batch) of a pack.

    Args:
        loader: over the streams of all subjects.
        contexts: encodes prompts when the text encoder is frozen; None when it takes part in the
            step, which then gets token ids.
        encode: the autoencoder, for rows of pixels; None when all rows are latents.
    """

    def __init__(
        self,
        config: RunConfig,
        base: BaseModel,
        method: Method,
        subjects: Sequence[SubjectStreams],
        loader: SampleLoader,
        contexts: ContextCache | None,
        encode: Encode | None,
        device: torch.device,
    ) -> None:
        self.config, self.method, self.subjects = config, method, subjects
        self.loader, self.contexts, self.encode, self.device = loader, contexts, encode, device
        self.scaling_factor = base.scaling_factor
        self.timesteps = base.scheduler.config["num_train_timesteps"]
        self.weights = torch.tensor([self._weights(s) for s in subjects], device=device)
        # By identity: a stream belongs to one subject.
        self._prompts: dict[int, tuple[int, Prompt]] = {}
        for slot, subject in enumerate(subjects):
            self._prompts[id(subject.instance)] = (slot, subject.instance_prompt)
            if subject.prior is not None and subject.prior_prompt is not None:
                self._prompts[id(subject.prior)] = (slot, subject.prior_prompt)

    def _weights(self, subject: SubjectStreams) -> list[float]:
        size = self.config.data.batch_size
        own = [1.0 / size] * size
        if subject.prior is None:
            return own
        return own + [subject.prior_weight / size] * size

    def batch(self, cursors: tuple[int, ...], micro: int) -> dict[str, Tensor]:
        """Tensors on the device, as `Denoiser.forward` documents them.

        Args:
            cursors: how many pictures each subject has seen before this update.
        """
        rows, content = self.loader.rows((cursors, micro))
        moments = self._moments(content.to(self.device, non_blocking=True))
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        draws = [
            draw(shape, self.timesteps, stream.seed, stream.subject, stream.name, sample.position)
            for stream, sample in rows
        ]
        posterior = np.stack(
            [self._posterior_draws(d.posterior, *row) for d, row in zip(draws, rows, strict=True)]
        )
        latents = posterior_sample(moments, torch.from_numpy(posterior).to(self.device))
        batch = {
            "latents": latents * self.scaling_factor,
            "noise": torch.from_numpy(np.stack([d.noise for d in draws])),
            "timesteps": torch.tensor([d.timestep for d in draws]),
        }
        prompts = [self._prompt(stream, sample) for stream, sample in rows]
        if self.contexts is None:
            batch["ids"] = torch.stack(
                [
                    self.method.tokenizer.ids(text, self.method.new_word(slot))
                    for slot, text in prompts
                ]
            )
        else:
            batch["context"] = self.contexts.get([text for _, text in prompts])
        moved = {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}
        return {**moved, "weights": self.weights}

    def _prompt(self, stream: SampleStream, sample: Sample) -> tuple[int, str]:
        slot, prompt = self._prompts[id(stream)]
        return slot, prompt(sample.position, sample.picture)

    def _moments(self, content: Tensor) -> Tensor:
        if content.dtype != torch.uint8:
            return content.float()
        assert self.encode is not None
        return self.encode(content.float() / 127.5 - 1)

    def _posterior_draws(
        self, fresh: np.ndarray, stream: SampleStream, sample: Sample
    ) -> np.ndarray:
        """Noise for the posterior sample under the configured way of sampling it."""
        way = self.config.data.latent_sampling
        if way == "deterministic":
            return np.zeros_like(fresh)
        if way == "once":
            once = f"{stream.name} once"
            return draw(fresh.shape, 1, stream.seed, stream.subject, once, sample.picture).posterior
        return fresh


def make_loader(
    config: RunConfig,
    subjects: Sequence[SubjectStreams],
    rank: int,
    world: int,
    pin: bool,
    warn: Callable[[str], None],
) -> SampleLoader:
    """The loader over the streams of a pack, as the config asks for it."""
    data = config.data
    share = Share(data.batch_size, config.train.gradient_accumulation_steps, rank, world)
    workers = 0
    if not data.cache_latents:
        workers = 2 if data.num_workers is None else data.num_workers
    return SampleLoader([s.streams for s in subjects], share, workers, pin, warn)
