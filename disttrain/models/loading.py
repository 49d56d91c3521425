"""What every way of loading a base model shares: its errors in one line, its noise, its digest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers.utils.logging as diffusers_logging
import transformers.utils.logging as transformers_logging

from disttrain.files import digest_of, sha256_bytes, sha256_file

MIB = 2**20
WHOLE = 64 * MIB
SAMPLED_BLOCKS = 256
BLOCK = 2**14


def one_line(error: BaseException, limit: int = 200) -> str:
    """An error's text on one line of at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside the block diffusers and transformers show neither progress bars nor warnings.

    What they warn about (weights that are missing) is checked and raised by the caller instead.
    """
    libraries = (diffusers_logging, transformers_logging)
    bars = [library for library in libraries if library.is_progress_bar_enabled()]
    levels = [library.get_verbosity() for library in libraries]
    try:
        for library in libraries:
            library.disable_progress_bar()
            library.set_verbosity_error()
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
        for library in bars:
            library.enable_progress_bar()


def weights_digest(files: Iterable[tuple[str, Path]]) -> str:
    """Digest of weight files, given as (name, path): whole to 64 MiB, else a sample of their bytes.

    Hashing gigabytes at each start would cost more than loading them, so a large file
    counts by its name, its size, its first and last MiB (the safetensors header lies in the first)
    and 256 blocks of 16 KiB spread evenly over it. Retrained or merged weights differ all over, so
    this tells them apart; it does not detect a flipped bit.
    """
    return digest_of([[name, *_sampled(path)] for name, path in sorted(files)])


def _sampled(path: Path) -> tuple[int, str]:
    size = path.stat().st_size
    if size <= WHOLE:
        return size, sha256_file(path)
    starts = [0, max(0, size - MIB)]
    lengths = [MIB, MIB]
    starts += [size * number // SAMPLED_BLOCKS for number in range(SAMPLED_BLOCKS)]
    lengths += [BLOCK] * SAMPLED_BLOCKS
    pieces = bytearray()
    with path.open("rb") as handle:
        for start, length in zip(starts, lengths, strict=True):
            handle.seek(start)
            pieces += handle.read(length)
    return size, sha256_bytes(bytes(pieces))
