"""Textual inversion (Gal et al. 2022): each subject learns the vectors of one new token.

Invariant: the trainable tensor is `[S, vectors, width]` and nothing else; the vocabulary matrix is
frozen, so its rows stay bit-identical and no state or traffic grows with its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from disttrain.config import RunConfig, TextualInversionSettings
from disttrain.errors import ConfigError
from disttrain.formats.embedding import write_embedding
from disttrain.methods.base import NewWord, ParameterGroup
from disttrain.models.base import BaseModel
from disttrain.models.packed import PackedTokenEmbedding
from disttrain.models.text import PromptTokenizer, vocabulary_of


class TextualInversion:
    """New token vectors for each subject of a pack."""

    trains_text = True

    @staticmethod
    def check(base: BaseModel, config: RunConfig) -> None:
        """Refuse tokens that the vocabulary holds, and an initial text without words."""
        plain = PromptTokenizer(base.tokenizer)
        for i, subject in enumerate(config.subjects):
            if plain.single_id(subject.token) is not None:
                raise ConfigError(
                    f"subjects.{i}.token: the vocabulary already holds '{subject.token}'; "
                    f"choose a new word such as <{subject.token}>"
                )
        settings = config.method
        assert isinstance(settings, TextualInversionSettings)
        if settings.init_text and not plain.piece_count(settings.init_text):
            text = settings.init_text
            raise ConfigError(f"method.init_text: {text!r} has no words; leave it empty for zeros")

    def __init__(self, base: BaseModel, members: Sequence[RunConfig]) -> None:
        settings = members[0].method
        assert isinstance(settings, TextualInversionSettings)
        self.plain = PromptTokenizer(base.tokenizer)
        self.tokenizer = PromptTokenizer(base.tokenizer, settings.num_vectors)
        self.vocabulary = vocabulary_of(base.text_encoder)
        rows = torch.cat([self.initial(member)["tokens"] for member in members])
        self.embedding = PackedTokenEmbedding(self.vocabulary, rows, self.tokenizer.first_id)
        base.text_encoder.set_input_embeddings(self.embedding)
        self.arrange(members)

    def groups(self) -> list[ParameterGroup]:
        """One group with one tensor, `[S, vectors, width]`."""
        return [ParameterGroup("tokens", {"tokens": self.embedding.rows})]

    def initial(self, member: RunConfig) -> dict[str, Tensor]:
        """The vectors of the initial text, `[1, vectors, width]`."""
        settings = member.method
        assert isinstance(settings, TextualInversionSettings)
        start = initial_vectors(
            self.vocabulary.weight, self.plain, settings.init_text, settings.num_vectors
        )
        return {"tokens": start[None].float()}

    def arrange(self, members: Sequence[RunConfig]) -> None:
        """Remember whose vectors lie in which slot."""
        self.members = members

    def new_word(self, slot: int) -> str:
        """The subject's token."""
        return self.members[slot].subjects[0].token

    def new_vectors(self, slot: int) -> NewWord | None:
        """The subject's vectors."""
        return NewWord(self.embedding.rows[slot].detach(), self.vocabulary.weight)

    def untouched(self) -> AbstractContextManager[None]:
        """It always is."""
        return nullcontext()

    def export(self, slot: int, folder: Path, stem: str, step: int) -> Path:
        """Write `STEM.safetensors`: the vectors under the token's name."""
        member = self.members[slot]
        subject = member.subjects[0]
        path = folder / f"{stem}.safetensors"
        metadata = {"step": str(step), "base_model": member.base_model}
        write_embedding(path, subject.token, self.embedding.rows[slot].detach(), metadata)
        return path


def initial_vectors(
    vocabulary: Tensor, tokenizer: PromptTokenizer, init_text: str, num_vectors: int
) -> Tensor:
    """Starting vectors `[num_vectors, width]`, as the web UI's "create embedding" makes them.

    The L vectors of `init_text` are spread block-wise: row i is vector `i * L // num_vectors`. An
    empty text gives zeros. A text of more than num_vectors pieces is cut to the first ones.
    """
    if not init_text:
        return torch.zeros(num_vectors, vocabulary.shape[1])
    pieces = tokenizer.tokenizer(init_text, add_special_tokens=False).input_ids[:num_vectors]
    chosen = [pieces[i * len(pieces) // num_vectors] for i in range(num_vectors)]
    return vocabulary.detach()[torch.tensor(chosen, device=vocabulary.device)]
