"""From samples to the tensors of one step.

Between `data/loader.py` (samples of a rank) and the denoiser. Invariant: rows are subject-major, a
subject's own pictures first, its class pictures after them; noise and timesteps come from each
sample's draw index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from disttrain.config import RunConfig
from disttrain.data.loader import Sample, SampleStream, batch_positions
from disttrain.methods.base import Method
from disttrain.methods.objective import draw, posterior_sample
from disttrain.models.base import BaseModel
from disttrain.models.text import ContextCache


@dataclass(frozen=True)
class SubjectStreams:
    """Where the samples of one subject come from."""

    instance: SampleStream
    prior: SampleStream | None


class Batcher:
    """Makes the batch of any (cursor, micro-batch, rank) of a pack.

    Args:
        contexts: encodes prompts when the text encoder is frozen; None when it takes part in the
            step, which then gets token ids.
    """

    def __init__(
        self,
        config: RunConfig,
        base: BaseModel,
        method: Method,
        streams: Sequence[SubjectStreams],
        contexts: ContextCache | None,
        device: torch.device,
    ) -> None:
        self.config, self.method, self.streams = config, method, streams
        self.contexts, self.device = contexts, device
        self.scaling_factor = base.scaling_factor
        self.timesteps = base.scheduler.config["num_train_timesteps"]
        self.weights = torch.tensor([self._weights(s) for s in streams], device=device)

    def _weights(self, streams: SubjectStreams) -> list[float]:
        size = self.config.data.batch_size
        own = [1.0 / size] * size
        if streams.prior is None:
            return own
        assert self.config.prior is not None
        return own + [self.config.prior.prior_loss_weight / size] * size

    def samples(
        self, cursor: int, micro: int, rank: int, world: int
    ) -> list[tuple[int, SampleStream, Sample]]:
        """(slot, stream, sample) of each row, subject-major."""
        positions = batch_positions(cursor, micro, self.config.data.batch_size, rank, world)
        return [
            (slot, stream, stream.sample(position))
            for slot, streams in enumerate(self.streams)
            for stream in (streams.instance, streams.prior)
            if stream is not None
            for position in positions
        ]

    def batch(self, cursor: int, micro: int, rank: int, world: int) -> dict[str, Tensor]:
        """Tensors on the device, as `Denoiser.forward` documents them."""
        rows = self.samples(cursor, micro, rank, world)
        moments = torch.stack([sample.moments for _, _, sample in rows])
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        draws = [
            draw(shape, self.timesteps, stream.seed, stream.subject, stream.name, sample.position)
            for _, stream, sample in rows
        ]
        posterior = [
            self._posterior_draws(d.posterior, row) for d, row in zip(draws, rows, strict=True)
        ]
        latents = posterior_sample(moments, torch.from_numpy(np.stack(posterior)))
        batch = {
            "latents": latents * self.scaling_factor,
            "noise": torch.from_numpy(np.stack([d.noise for d in draws])),
            "timesteps": torch.tensor([d.timestep for d in draws]),
        }
        if self.contexts is None:
            batch["ids"] = torch.stack(
                [self.method.tokenizer.ids(s.prompt, self.method.new_word(i)) for i, _, s in rows]
            )
        else:
            batch["context"] = self.contexts.get([sample.prompt for _, _, sample in rows])
        moved = {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}
        return {**moved, "weights": self.weights}

    def _posterior_draws(
        self, fresh: np.ndarray, row: tuple[int, SampleStream, Sample]
    ) -> np.ndarray:
        """Noise for the posterior sample under the configured way of sampling it."""
        _, stream, sample = row
        way = self.config.data.latent_sampling
        if way == "deterministic":
            return np.zeros_like(fresh)
        if way == "once":
            once = f"{stream.name} once"
            return draw(fresh.shape, 1, stream.seed, stream.subject, once, sample.picture).posterior
        return fresh
