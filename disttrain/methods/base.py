"""The Method protocol: what a way of teaching subjects must say; everything else is shared.

A method takes the frozen base apart where it needs to, names its trainable tensors, and writes
results. Invariant: after `__init__` exactly the tensors in `parameters()` require gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn
from transformers import CLIPTokenizer

from disttrain.config import METHODS_WITH_CLASS_WORD, RunConfig, SubjectSettings
from disttrain.models.base import BaseModel
from disttrain.models.text import PromptTokenizer


@dataclass(frozen=True)
class ParameterGroup:
    """Trainable tensors of one part of the model, which share a learning rate."""

    name: str
    parameters: dict[str, nn.Parameter]


@dataclass(frozen=True)
class NewWord:
    """The `vectors` `[N, width]` that a subject's word stands for, and the base's `vocabulary`
    `[V, width]`."""

    vectors: Tensor
    vocabulary: Tensor


class Method(Protocol):
    """One way of teaching the subjects of a pack."""

    tokenizer: PromptTokenizer
    trains_text: bool
    """Whether prompts must pass through the text encoder inside each step."""

    @staticmethod
    def check(base: BaseModel, config: RunConfig) -> None:
        """Find settings that do not fit this base model, before anything is written.

        Raises:
            ConfigError: naming the key.
        """
        ...

    def __init__(self, base: BaseModel, members: Sequence[RunConfig]) -> None:
        """Make the trainable tensors inside the parts of `base`; `check` has passed.

        Args:
            members: the settings of each subject alone; they share base and method.
        """
        ...

    def groups(self) -> list[ParameterGroup]:
        """The trainable tensors, by learning rate. Names are stable: checkpoints use them."""
        ...

    def initial(self, member: RunConfig) -> dict[str, Tensor]:
        """What a subject's tensors begin with, `[1, ...]` by name; nothing for the base's own."""
        ...

    def arrange(self, members: Sequence[RunConfig]) -> None:
        """These subjects are now in the slots; their tensors have been put in place."""
        ...

    def new_word(self, slot: int) -> str:
        """The word that stands for new token ids in this subject's prompts, or nothing."""
        ...

    def new_vectors(self, slot: int) -> NewWord | None:
        """What is all that a subject changes: a new word. None where other prompts may come to
        draw something else too."""
        ...

    def untouched(self) -> AbstractContextManager[None]:
        """Inside, prompts without a new word draw what the base draws. Of a model that changes as
        a whole: until its first step."""
        ...

    def export(self, slot: int, folder: Path, stem: str, step: int) -> Path:
        """Write the result of the subject in `slot` into `folder`; returns the result's path.

        Args:
            stem: file name without its suffix, for results that are files.
        """
        ...


def all_parameters(groups: Sequence[ParameterGroup]) -> dict[str, nn.Parameter]:
    """Every trainable tensor of a method's groups by name."""
    return {name: value for group in groups for name, value in group.parameters.items()}


RARE_ID = 40_000


def token_warning(config: RunConfig, tokenizer: CLIPTokenizer, subject: SubjectSettings) -> str:
    """A warning when a subject's token already means something in the vocabulary, else nothing.

    CLIP's vocabulary is in the order of its merges, so a low id is a frequent word; the rare words
    people use (sks 48136, ohwx 47993) are near its end. Textual inversion refuses known words
    outright, so this is for the other methods.
    """
    found = PromptTokenizer(tokenizer).single_id(subject.token)
    if config.method.name not in METHODS_WITH_CLASS_WORD or found is None or found >= RARE_ID:
        return ""
    return (
        f"subject {subject.name}: token '{subject.token}' is a common word that will lose its "
        "meaning; a rare one such as sks or ohwx keeps the rest of the vocabulary as it is"
    )
