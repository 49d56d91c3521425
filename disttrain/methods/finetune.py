"""Full fine-tuning: the UNet, and the text encoder if asked, learn a captioned set of pictures.

Invariant: always a pack of one, because the base itself changes; the result is a complete diffusers
model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from torch import Tensor

from disttrain.config import DreamboothSettings, FinetuneSettings, RunConfig
from disttrain.methods.base import NewWord, ParameterGroup
from disttrain.models.base import BaseModel
from disttrain.models.text import PromptTokenizer


class Finetune:
    """The UNet and, if asked, the text encoder in full."""

    @staticmethod
    def check(base: BaseModel, config: RunConfig) -> None:
        """Nothing: every model can be trained whole."""

    def __init__(self, base: BaseModel, members: Sequence[RunConfig]) -> None:
        settings = members[0].method
        assert isinstance(settings, (DreamboothSettings, FinetuneSettings))
        self.base = base
        self.tokenizer = PromptTokenizer(base.tokenizer)
        self.trains_text = settings.train_text_encoder
        base.unet.requires_grad_(True)
        if settings.train_text_encoder:
            base.text_encoder.requires_grad_(True)
        self.arrange(members)

    def groups(self) -> list[ParameterGroup]:
        """UNet and text encoder with their own learning rates."""
        unet = {f"unet.{name}": value for name, value in self.base.unet.named_parameters()}
        found = [ParameterGroup("unet", unet)]
        if self.trains_text:
            text = {
                f"text_encoder.{name}": value
                for name, value in self.base.text_encoder.named_parameters()
            }
            found.append(ParameterGroup("text_encoder", text))
        return found

    def initial(self, member: RunConfig) -> dict[str, Tensor]:
        """Nothing: the model begins as the base is."""
        return {}

    def arrange(self, members: Sequence[RunConfig]) -> None:
        """One subject, always the same: a model that changes as a whole holds no other."""
        assert len(members) == 1

    def new_word(self, slot: int) -> str:
        """None: captions are made of words the vocabulary holds."""
        return ""

    def new_vectors(self, slot: int) -> NewWord | None:
        """None: everything changes."""
        return None

    def untouched(self) -> AbstractContextManager[None]:
        """Until the first step it is."""
        return nullcontext()

    def export(self, slot: int, folder: Path, stem: str, step: int) -> Path:
        """Write `model/`: a diffusers folder with every part of the model."""
        path = folder / "model"
        self.base.save(path)
        return path
