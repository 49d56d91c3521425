"""From cached latents and a plan of their order to the samples of a batch.

Between `latents.py` and the objective. Invariant: the sample at a position of a subject's stream is
a function of (seed, subject, position); a rank takes its slice of each global batch, so the global
sequence does not depend on the world, and the state of the data is one cursor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from disttrain import randomness
from disttrain.data.order import SampleOrder


@dataclass(frozen=True)
class Sample:
    """One training picture as the objective needs it."""

    key: str
    position: int
    """Draw index: how many samples of its stream came before it."""
    picture: int
    """Number of the picture in its source."""
    moments: Tensor
    """`[2C, h, w]`: mean and log variance of the autoencoder's posterior."""
    prompt: str


class SampleStream:
    """The endless sequence of samples of one subject's pictures, or of its class pictures.

    Args:
        name: "instance" or "class"; with seed and subject it keys every draw.
        keys: a name for each picture, for messages.
        moments: latents of picture i in variant v.
        variants: how many cached crops and mirrorings there are of each picture.
        prompt: text for (position, picture).
    """

    def __init__(
        self,
        subject: str,
        name: str,
        seed: int,
        keys: Sequence[str],
        moments: Callable[[int, int], Tensor],
        variants: int,
        prompt: Callable[[int, int], str],
    ) -> None:
        self.subject, self.name, self.seed, self.keys = subject, name, seed, keys
        self.moments, self.variants, self.prompt = moments, variants, prompt
        self.order = SampleOrder(len(keys), seed, subject, name)

    def sample(self, position: int) -> Sample:
        """The sample at `position`, counted over all epochs."""
        picture = self.order.sample_at(position)
        stream = (self.subject, self.name, "variant")
        variant = randomness.integer(self.variants, self.seed, stream, position)
        return Sample(
            self.keys[picture],
            position,
            picture,
            self.moments(picture, variant),
            self.prompt(position, picture),
        )

    def epoch_of(self, position: int) -> int:
        """How often every picture had been seen before `position`."""
        return self.order.epoch_of(position)


def batch_positions(cursor: int, micro: int, batch_size: int, rank: int, world: int) -> range:
    """Positions of one rank's share of micro-batch `micro` of the update that starts at `cursor`.

    Micro-batches follow one another and each is cut into `world` slices, so that 2 processes with a
    batch of 2 train on what 1 process with a batch of 4 does.
    """
    start = cursor + (micro * world + rank) * batch_size
    return range(start, start + batch_size)
