"""LoRA (Hu et al. 2021): each subject learns low-rank changes to the attention layers.

Invariant: every trainable tensor is `[S, rank, in]` or `[S, out, rank]`; `up` starts at zero, so
step 0 is the base model. The draws of `down` are keyed by the subject's name, so a subject starts
the same in any pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from disttrain import randomness
from disttrain.config import LoraSettings, RunConfig, SubjectSettings
from disttrain.errors import ConfigError
from disttrain.formats.lora import LoRALayer, write_lora
from disttrain.methods.base import ParameterGroup
from disttrain.models.base import BaseModel
from disttrain.models.packed import PackedLoRALinear, linear_layers, replace_layer
from disttrain.models.text import PromptTokenizer


class Lora:
    """Low-rank changes for each subject of a pack."""

    @staticmethod
    def check(base: BaseModel, config: RunConfig) -> None:
        """Refuse target modules that no linear layer of the model has."""
        settings = config.method
        assert isinstance(settings, LoraSettings)
        wanted: list[tuple[str, nn.Module, tuple[str, ...]]] = [
            ("method.target_modules", base.unet, settings.target_modules)
        ]
        if settings.train_text_encoder:
            key = "method.text_encoder_target_modules"
            wanted.append((key, base.text_encoder, settings.text_encoder_target_modules))
        for key, model, targets in wanted:
            for target in targets:
                if not list(linear_layers(model, (target,))):
                    raise ConfigError(
                        f"{key}: no linear layer's name ends in '{target}'; remove it"
                    )

    def __init__(
        self, base: BaseModel, config: RunConfig, subjects: Sequence[SubjectSettings]
    ) -> None:
        settings = config.method
        assert isinstance(settings, LoraSettings)
        self.config, self.settings, self.subjects = config, settings, subjects
        self.family = base.family
        self.tokenizer = PromptTokenizer(base.tokenizer)
        self.trains_text = settings.train_text_encoder
        self.layers: dict[str, PackedLoRALinear] = {}
        self._attach("unet", base.unet, settings.target_modules)
        if settings.train_text_encoder:
            targets = settings.text_encoder_target_modules
            self._attach("text_encoder", base.text_encoder, targets)

    def _attach(self, part: str, model: nn.Module, targets: tuple[str, ...]) -> None:
        for name, linear in list(linear_layers(model, targets)):
            full = f"{part}.{name}"
            down = torch.stack([self._initial_down(s.name, full, linear) for s in self.subjects])
            up = torch.zeros(len(self.subjects), linear.out_features, self.settings.rank)
            device = linear.weight.device
            layer = PackedLoRALinear(linear, down.to(device), up.to(device), self.settings.alpha)
            replace_layer(model, name, layer)
            self.layers[full] = layer

    def _initial_down(self, subject: str, layer: str, linear: nn.Linear) -> Tensor:
        """Uniform in plus-minus 1 / sqrt(in), as the authors' own code starts it."""
        source = randomness.generator(self.config.seed, (subject, "lora", layer))
        drawn = source.random((self.settings.rank, linear.in_features), dtype=np.float32)
        return torch.from_numpy((2 * drawn - 1) / linear.in_features**0.5)

    def groups(self) -> list[ParameterGroup]:
        """UNet and text encoder changes with their own learning rates."""
        optim = self.config.optim
        rates = {
            "unet": optim.learning_rate,
            "text_encoder": optim.text_encoder_learning_rate or optim.learning_rate,
        }
        found = []
        for part, rate in rates.items():
            parameters = {}
            for name, layer in self.layers.items():
                if name.startswith(f"{part}."):
                    parameters[f"{name}.down"] = layer.down
                    parameters[f"{name}.up"] = layer.up
            if parameters:
                found.append(ParameterGroup(part, rate, parameters))
        return found

    def new_word(self, slot: int) -> str:
        """None: the subject is called by a word the vocabulary holds."""
        return ""

    def export(self, slot: int, folder: Path, stem: str, step: int) -> Path:
        """Write `STEM.safetensors` under the names that diffusers, the web UI and ComfyUI read."""
        subject = self.subjects[slot]
        path = folder / f"{stem}.safetensors"
        layers = {
            name: LoRALayer(layer.down[slot].detach(), layer.up[slot].detach(), self.settings.alpha)
            for name, layer in self.layers.items()
        }
        metadata = {
            "ss_output_name": subject.name,
            "ss_base_model_version": {"sd1": "sd_v1", "sd2": "sd_v2"}[self.family],
            "ss_v2": str(self.family == "sd2"),
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(self.settings.rank),
            "ss_network_alpha": str(self.settings.alpha),
            "ss_sd_model_name": self.config.base_model,
            "ss_resolution": str(self.config.data.resolution),
            "ss_steps": str(step),
        }
        write_lora(path, layers, metadata)
        return path
