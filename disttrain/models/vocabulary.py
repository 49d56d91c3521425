"""CLIP's vocabulary as a tokenizer, for base models without their own: tiny, single files.

Invariant: ids equal those of the CLIP text encoders inside Stable Diffusion 1.x and 2.x, so that a
text encoder of either family can be used with it. Every call builds a tokenizer of its own, because
training adds tokens to it.
"""

from __future__ import annotations

import gzip
from functools import lru_cache
from pathlib import Path

from transformers import CLIPTokenizer

VOCABULARY_FILE = Path(__file__).parent.parent / "assets" / "bpe_simple_vocab_16e6.txt.gz"
VOCABULARY_SIZE = 49408
MAX_TOKENS = 77
START_TOKEN = "<|startoftext|>"
END_TOKEN = "<|endoftext|>"

Merge = tuple[str, str]


def clip_tokenizer(pad_token: str = END_TOKEN) -> CLIPTokenizer:
    """A fresh CLIP tokenizer with 49,408 entries and a maximum of 77 tokens.

    `pad_token` is the end token in Stable Diffusion 1.x and "!" (id 0) in 2.x.
    """
    vocabulary, merges = _vocabulary()
    return CLIPTokenizer(
        vocab=dict(vocabulary),
        merges=list(merges),  # pyright: ignore[reportArgumentType]
        pad_token=pad_token,
        model_max_length=MAX_TOKENS,
    )


@lru_cache(maxsize=1)
def _vocabulary() -> tuple[dict[str, int], list[Merge]]:
    """Ids by symbol, and the merges in order of precedence.

    The order is that of OpenAI's CLIP: the byte symbols, the same ending a word, one symbol for
    each merge, then the two special tokens; only as many merges as fill the vocabulary are used.
    """
    symbols = _byte_symbols()
    merge_count = VOCABULARY_SIZE - 2 * len(symbols) - 2
    with gzip.open(VOCABULARY_FILE, "rt", encoding="utf-8") as lines:
        next(lines)
        merges = [_as_merge(line) for line, _ in zip(lines, range(merge_count), strict=False)]
    entries = symbols + [symbol + "</w>" for symbol in symbols]
    entries += ["".join(merge) for merge in merges]
    entries += [START_TOKEN, END_TOKEN]
    return {entry: number for number, entry in enumerate(entries)}, merges


def _as_merge(line: str) -> Merge:
    left, right = line.split()
    return left, right


def _byte_symbols() -> list[str]:
    """The printable character that stands for each byte, in the order of CLIP's vocabulary.

    Bytes that are printable in Latin-1 stand for themselves and come first; the others are shown
    as characters from 256 upwards (the byte-level scheme of GPT-2).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden_count = 256 - len(printable)
    return [chr(code) for code in printable] + [chr(256 + n) for n in range(hidden_count)]
