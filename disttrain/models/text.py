"""From prompts to the context the UNet attends to.

Between `prompts.py` (text) and the denoiser (tensors). Invariant: a prompt gives the same ids as a
stock diffusers pipeline gives after `load_textual_inversion` of the subject's file, except that the
new ids are counted per subject from the vocabulary's size.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from disttrain.files import digest_of, sha256_bytes
from disttrain.models.names import public_name

_BEHAVIOUR = ("hidden_act", "layer_norm_eps", "num_attention_heads")
"""What of a text encoder's configuration changes its results without changing a weight's shape."""


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


def text_encoder_digest(text_encoder: CLIPTextModel) -> str:
    """Hex digest of a text encoder's weights, their type, and how it computes.

    Taken from the weights in memory, so it does not depend on which file they came from; for SD 1
    it takes half a second.
    """
    parts = [[name, getattr(text_encoder.config, name)] for name in _BEHAVIOUR]
    for name, weight in sorted(text_encoder.state_dict().items()):
        values = weight.detach().cpu().contiguous()
        digest = sha256_bytes(values.view(-1).view(torch.uint8).numpy().tobytes())
        parts.append([public_name("text_encoder", name), str(weight.dtype), *weight.shape, digest])
    return digest_of(parts)


class ContextStore(Protocol):
    """Where contexts `[length, width]`, float32 on the CPU, are kept between runs by their keys."""

    def scan(self) -> None:
        """Take note of what others have added."""
        ...

    def read(self, key: str) -> Tensor | None:
        """An intact context, None if there is none."""
        ...

    def write_all(self, items: Iterable[tuple[str, Tensor]]) -> int:
        """Add contexts as they come; returns how many came."""
        ...


class ContextCache:
    """Contexts of prompts under a frozen text encoder, each computed once and alone.

    One prompt at a time and without autocast, so that a context's bits never depend on which
    prompts came with it or who asked. Holds at most `limit` prompts; the oldest leave first.

    Args:
        store: where contexts are looked up before they are computed; it changes no result. Of
            those that the same text encoder wrote, on the same kind of device.
    """

    def __init__(
        self,
        tokenizer: PromptTokenizer,
        text_encoder: CLIPTextModel,
        limit: int = 4096,
        store: ContextStore | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.limit = limit
        self.store = store
        self.contexts: dict[str, Tensor] = {}

    @cached_property
    def encoder_digest(self) -> str:
        """Digest of the text encoder, as it was when first asked for."""
        return text_encoder_digest(self.text_encoder)

    def get(self, prompts: Sequence[str]) -> Tensor:
        """Contexts `[len(prompts), length, width]`."""
        return torch.stack([self._one(prompt) for prompt in prompts])

    def key(self, ids: Tensor) -> str:
        """What a store calls the context of ids `[length]`."""
        return digest_of([self.encoder_digest, ids.tolist()])

    @torch.no_grad()
    def compute(self, ids: Tensor) -> Tensor:
        """Context `[length, width]` of ids `[length]`, looked up nowhere."""
        device = self.text_encoder.device
        with torch.autocast(device.type, enabled=False):
            return encode_ids(self.text_encoder, ids[None].to(device))[0]

    def _one(self, prompt: str) -> Tensor:
        if prompt not in self.contexts:
            while len(self.contexts) >= self.limit:
                self.contexts.pop(next(iter(self.contexts)))
            ids = self.tokenizer.ids(prompt)
            found = None if self.store is None else self.store.read(self.key(ids))
            if found is None:
                found = self.compute(ids)
            self.contexts[prompt] = found.to(self.text_encoder.device, self.text_encoder.dtype)
        return self.contexts[prompt]
