"""Full fine-tuning: the UNet, and the text encoder if asked, learn a captioned set of pictures.

Invariant: always a pack of one, because the base itself changes; the result is a complete diffusers
model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from disttrain.config import DreamboothSettings, FinetuneSettings, RunConfig, SubjectSettings
from disttrain.methods.base import ParameterGroup
from disttrain.models.base import BaseModel
from disttrain.models.text import PromptTokenizer


class Finetune:
    """The UNet and, if asked, the text encoder in full."""

    @staticmethod
    def check(base: BaseModel, config: RunConfig) -> None:
        """Nothing: every model can be trained whole."""

    def __init__(
        self, base: BaseModel, config: RunConfig, subjects: Sequence[SubjectSettings]
    ) -> None:
        settings = config.method
        assert isinstance(settings, (DreamboothSettings, FinetuneSettings))
        assert len(subjects) == 1, "a model that changes as a whole holds one subject"
        self.base, self.config, self.subjects = base, config, subjects
        self.tokenizer = PromptTokenizer(base.tokenizer)
        self.trains_text = settings.train_text_encoder
        base.unet.requires_grad_(True)
        if settings.train_text_encoder:
            base.text_encoder.requires_grad_(True)

    def groups(self) -> list[ParameterGroup]:
        """UNet and text encoder with their own learning rates."""
        optim = self.config.optim
        unet = {f"unet.{name}": value for name, value in self.base.unet.named_parameters()}
        found = [ParameterGroup("unet", optim.learning_rate, unet)]
        if self.trains_text:
            rate = optim.text_encoder_learning_rate or optim.learning_rate
            text = {
                f"text_encoder.{name}": value
                for name, value in self.base.text_encoder.named_parameters()
            }
            found.append(ParameterGroup("text_encoder", rate, text))
        return found

    def new_word(self, slot: int) -> str:
        """None: captions are made of words the vocabulary holds."""
        return ""

    def export(self, slot: int, folder: Path, stem: str, step: int) -> Path:
        """Write `model/`: a diffusers folder with every part of the model."""
        path = folder / "model"
        self.base.save(path)
        return path
