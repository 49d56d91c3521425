"""From prompts to the context the UNet attends to.

Between `prompts.py` (text) and the denoiser (tensors). Invariant: a prompt gives the same ids as a
stock diffusers pipeline gives after `load_textual_inversion` of the subject's file, except that the
new ids are counted per subject from the vocabulary's size.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer


class PromptTokenizer:
    """Token ids of prompts; optionally one word that stands for several new ids.

    Args:
        tokenizer: the base model's; it is copied before anything is added to it.
        new_ids: how many new ids follow the vocabulary (the vectors of a new token).
    """

    def __init__(self, tokenizer: CLIPTokenizer, new_ids: int = 0) -> None:
        self.first_id = len(tokenizer)
        self.pieces: list[str] = []
        if new_ids:
            tokenizer = copy.deepcopy(tokenizer)
            self.pieces = [f"<|new-vector-{i}|>" for i in range(new_ids)]
            added = tokenizer.add_tokens(self.pieces)
            assert added == new_ids
        self.tokenizer = tokenizer

    def ids(self, prompt: str, new_word: str = "") -> Tensor:
        """Ids `[length]` (77 for Stable Diffusion), padded and cut as diffusers pipelines do.

        Args:
            new_word: the word in `prompt`, in any case, that stands for the new ids.
        """
        if self.pieces and new_word:
            words = " ".join(self.pieces)
            prompt = re.sub(re.escape(new_word), lambda _: words, prompt, flags=re.IGNORECASE)
        encoded = self.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt")
        return encoded.input_ids[0]

    def piece_count(self, word: str) -> int:
        """How many vocabulary entries a word is cut into."""
        return len(self.tokenizer(word, add_special_tokens=False).input_ids)

    def single_id(self, word: str) -> int | None:
        """The id of a word that is one vocabulary entry, else None."""
        found = self.tokenizer(word, add_special_tokens=False).input_ids
        return found[0] if len(found) == 1 else None


def vocabulary_of(text_encoder: CLIPTextModel) -> nn.Embedding:
    """The text encoder's token embedding, as long as nothing was put in its place."""
    vocabulary = text_encoder.get_input_embeddings()
    assert isinstance(vocabulary, nn.Embedding)
    return vocabulary


def encode_ids(text_encoder: CLIPTextModel, ids: Tensor) -> Tensor:
    """Context `[B, length, width]` of ids `[B, length]`: the last hidden state (SD 1 and 2)."""
    return text_encoder(input_ids=ids).last_hidden_state


class ContextCache:
    """Contexts of prompts under a frozen text encoder, each computed once and alone.

    One prompt at a time, so that a context's bits never depend on which prompts came with it. Holds
    at most `limit` prompts; the oldest leave first.
    """

    def __init__(
        self, tokenizer: PromptTokenizer, text_encoder: CLIPTextModel, limit: int = 4096
    ) -> None:
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.limit = limit
        self.contexts: dict[str, Tensor] = {}

    def get(self, prompts: Sequence[str]) -> Tensor:
        """Contexts `[len(prompts), length, width]`."""
        return torch.stack([self._one(prompt) for prompt in prompts])

    @torch.no_grad()
    def _one(self, prompt: str) -> Tensor:
        if prompt not in self.contexts:
            while len(self.contexts) >= self.limit:
                self.contexts.pop(next(iter(self.contexts)))
            ids = self.tokenizer.ids(prompt)[None].to(self.text_encoder.device)
            self.contexts[prompt] = encode_ids(self.text_encoder, ids)[0]
        return self.contexts[prompt]
