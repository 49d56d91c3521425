"""LoRA (Hu et al. 2021): each subject learns low-rank changes to the attention layers.

Invariant: every trainable tensor is `[S, rank, in]` or `[S, out, rank]`; `up` starts at zero, so
step 0 is the base model. The draws of `down` are keyed by the subject's name, so a subject starts
the same in any pack.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from disttrain import randomness
from disttrain.config import LoraSettings, RunConfig
from disttrain.errors import ConfigError
from disttrain.formats.lora import LoRALayer, write_lora
from disttrain.methods.base import NewWord, ParameterGroup
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

    def __init__(self, base: BaseModel, members: Sequence[RunConfig]) -> None:
        settings = members[0].method
        assert isinstance(settings, LoraSettings)
        self.settings, self.family = settings, base.family
        self.tokenizer = PromptTokenizer(base.tokenizer)
        self.trains_text = settings.train_text_encoder
        self.layers: dict[str, PackedLoRALinear] = {}
        self._attach("unet", base.unet, settings.target_modules)
        if settings.train_text_encoder:
            targets = settings.text_encoder_target_modules
            self._attach("text_encoder", base.text_encoder, targets)
        initial = [self.initial(member) for member in members]
        for name, layer in self.layers.items():
            for end, parameter in (("down", layer.down), ("up", layer.up)):
                drawn = torch.cat([values[f"{name}.{end}"] for values in initial])
                parameter.data = drawn.to(layer.weight.device)
        self.arrange(members)

    def _attach(self, part: str, model: nn.Module, targets: tuple[str, ...]) -> None:
        rank = self.settings.rank
        for name, linear in list(linear_layers(model, targets)):
            down, up = (
                torch.empty(0, rank, linear.in_features),
                torch.empty(0, linear.out_features, rank),
            )
            layer = PackedLoRALinear(linear, down, up, self.settings.alpha)
            replace_layer(model, name, layer)
            self.layers[f"{part}.{name}"] = layer

    def initial(self, member: RunConfig) -> dict[str, Tensor]:
        """`down` uniform in plus-minus 1 / sqrt(in), as the authors' own code starts it; `up` 0."""
        found = {}
        for name, layer in self.layers.items():
            source = randomness.generator(member.seed, (member.subjects[0].name, "lora", name))
            _, rank, width = layer.down.shape
            drawn = source.random((1, rank, width), dtype=np.float32)
            found[f"{name}.down"] = torch.from_numpy((2 * drawn - 1) / width**0.5)
            found[f"{name}.up"] = torch.zeros(1, layer.out_features, rank)
        return found

    def arrange(self, members: Sequence[RunConfig]) -> None:
        """Remember whose changes lie in which slot."""
        self.members = members

    def groups(self) -> list[ParameterGroup]:
        """UNet and text encoder changes with their own learning rates."""
        found = []
        for part in ("unet", "text_encoder"):
            parameters = {}
            for name, layer in self.layers.items():
                if name.startswith(f"{part}."):
                    parameters[f"{name}.down"] = layer.down
                    parameters[f"{name}.up"] = layer.up
            if parameters:
                found.append(ParameterGroup(part, parameters))
        return found

    def new_word(self, slot: int) -> str:
        """None: the subject is called by a word the vocabulary holds."""
        return ""

    def new_vectors(self, slot: int) -> NewWord | None:
        """None: layers change."""
        return None

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """The changes count nothing."""
        scales = {name: layer.scale for name, layer in self.layers.items()}
        try:
            for layer in self.layers.values():
                layer.scale = 0.0
            yield
        finally:
            for name, layer in self.layers.items():
                layer.scale = scales[name]

    def export(self, slot: int, folder: Path, stem: str, step: int) -> Path:
        """Write `STEM.safetensors` under the names that diffusers, the web UI and ComfyUI read."""
        member = self.members[slot]
        path = folder / f"{stem}.safetensors"
        layers = {
            name: LoRALayer(layer.down[slot].detach(), layer.up[slot].detach(), self.settings.alpha)
            for name, layer in self.layers.items()
        }
        metadata = {
            "ss_output_name": member.subjects[0].name,
            "ss_base_model_version": {"sd1": "sd_v1", "sd2": "sd_v2"}[self.family],
            "ss_v2": str(self.family == "sd2"),
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(self.settings.rank),
            "ss_network_alpha": str(self.settings.alpha),
            "ss_sd_model_name": member.base_model,
            "ss_resolution": str(member.data.resolution),
            "ss_steps": str(step),
        }
        write_lora(path, layers, metadata)
        return path
