"""Random draws as pure functions of (seed, stream, index): the only source of randomness.

A stream is named by words (`("fox", "noise")`), an index counts the samples a subject has seen. No
draw depends on rank, worker, world size, pack neighbours, earlier draws or the clock, so a
checkpoint holds no random state and any step can be replayed alone. Built on the counter-based
Philox generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), whose
numpy implementation gives the same bits on every platform.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

Stream = tuple[str, ...]


@lru_cache(maxsize=4096)
def _key(seed: int, stream: Stream) -> int:
    text = "\x1f".join((str(seed), *stream))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def generator(seed: int, stream: Stream, index: int = 0) -> np.random.Generator:
    """A fresh generator for one (seed, stream, index); two calls give the same numbers.

    `index` is the third word of Philox's 256-bit counter, which leaves 2**128 numbers to each.
    """
    counter = np.array([0, 0, index, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=_key(seed, stream)))


def normal(shape: tuple[int, ...], seed: int, stream: Stream, index: int = 0) -> np.ndarray:
    """Standard normal draws, float32, of the given shape."""
    return generator(seed, stream, index).standard_normal(shape, dtype=np.float32)


def uniform(seed: int, stream: Stream, index: int = 0) -> float:
    """One draw from [0, 1)."""
    return float(generator(seed, stream, index).random())


def integer(high: int, seed: int, stream: Stream, index: int = 0) -> int:
    """One draw from {0, ..., high - 1}."""
    return int(generator(seed, stream, index).integers(high))


def permutation(size: int, seed: int, stream: Stream, index: int = 0) -> np.ndarray:
    """A permutation of `range(size)` as int64."""
    return generator(seed, stream, index).permutation(size)


def initial_latents(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """The noise a picture starts from: what diffusers pipelines draw for a CPU generator's seed."""
    import torch

    return torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed))[0]
