"""CLIP-I, CLIP-T and DINO: features of the vision models that papers on personalisation report.

From a local folder or the hub, as transformers stores them. Invariant: pictures are prepared as
the model's own `preprocessor_config.json` says, so numbers can be compared with other people's.

CLIP: Radford et al. 2021; DINO: Caron et al. 2021, Oquab et al. 2023 (DINOv2). As measures of
likeness: Ruiz et al. 2022 (DreamBooth), section 4.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPModel

from disttrain.errors import DataError, ModelError
from disttrain.files import read_json
from disttrain.models.features import FeatureEncoder, Preparation, batches, unit_length
from disttrain.models.hub import download
from disttrain.models.loading import one_line, quiet_libraries
from disttrain.models.parts import frozen

CLIP_MEAN, CLIP_SPREAD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINO_KINDS = ("vit", "dinov2", "dinov2_with_registers")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# What transformers was seen to raise on folders that hold something else.
_TROUBLE = (OSError, ValueError, KeyError, RuntimeError, TypeError)


class ClipEncoder:
    """CLIP's picture side (CLIP-I) and its text side (CLIP-T)."""

    name = "CLIP-I"
    text_name = "CLIP-T"

    def __init__(
        self, model: Any, tokenizer: Any, preparation: Preparation, device: torch.device
    ) -> None:
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self.preparation = preparation

    @torch.no_grad()
    def encode(self, pictures: np.ndarray) -> np.ndarray:
        """Features `[N, D]`, float32 of length 1, of pictures `[N, H, W, 3]`, uint8."""
        parts = []
        for some in batches(pictures):
            pixels = self.preparation.apply(some).to(self.device)
            pooled = self.model.vision_model(pixel_values=pixels).pooler_output
            parts.append(self.model.visual_projection(pooled))
        return unit_length(torch.cat(parts))

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """Features `[N, D]`, float32 of length 1, of texts; words past CLIP's length are cut."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        ids, mask = tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)
        pooled = self.model.text_model(input_ids=ids, attention_mask=mask).pooler_output
        return unit_length(self.model.text_projection(pooled))


class DinoEncoder:
    """The class token of DINO's or DINOv2's last layer."""

    name = "DINO"

    def __init__(self, model: Any, preparation: Preparation, device: torch.device) -> None:
        self.model, self.preparation, self.device = model, preparation, device

    @torch.no_grad()
    def encode(self, pictures: np.ndarray) -> np.ndarray:
        """Features `[N, D]`, float32 of length 1, of pictures `[N, H, W, 3]`, uint8."""
        parts = []
        for some in batches(pictures):
            pixels = self.preparation.apply(some).to(self.device)
            parts.append(self.model(pixel_values=pixels).last_hidden_state[:, 0])
        return unit_length(torch.cat(parts))


def open_vision(spec: str, device: torch.device) -> FeatureEncoder:
    """The CLIP or DINO model in a folder or on the hub.

    Raises:
        ModelError: missing, unreachable, damaged, or of another kind.
    """
    folder = Path(spec).expanduser()
    if not folder.is_dir():
        folder = download(spec, None, [WEIGHTS], key="score.features")
    try:
        with quiet_libraries():
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            if config.model_type == "clip":
                clip = frozen(_loaded(CLIPModel, folder)).to(device)
                tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
                usual = (config.vision_config.image_size, CLIP_MEAN, CLIP_SPREAD)
                return ClipEncoder(clip, tokenizer, preparation_of(folder, *usual), device)
            if config.model_type in DINO_KINDS:
                dino = frozen(_loaded(AutoModel, folder)).to(device)
                usual = (config.image_size, IMAGENET_MEAN, IMAGENET_SPREAD)
                return DinoEncoder(dino, preparation_of(folder, *usual), device)
    except _TROUBLE as error:
        if isinstance(error, (ModelError, DataError)):
            raise
        raise ModelError(f"score.features: {spec}: cannot be loaded ({one_line(error)})") from error
    raise ModelError(
        f"score.features: {spec} is a {config.model_type} model; give CLIP, DINO or DINOv2"
    )


def _loaded(kind: Any, folder: Path) -> Any:
    """A model whose weights were all in the folder; others would be drawn at random in silence."""
    model, found = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    # A pooler on top of the class token is not used, and some DINO files lack it.
    missing = sorted(name for name in found["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ModelError(f"score.features: {folder}: {missing[0]} is missing; fetch it anew")
    return model


def preparation_of(
    folder: Path,
    usual_side: int,
    usual_mean: tuple[float, float, float],
    usual_spread: tuple[float, float, float],
) -> Preparation:
    """What a model folder's `preprocessor_config.json` says; the usual where it says nothing.

    Raises:
        DataError: the file is damaged.
    """
    path = folder / "preprocessor_config.json"
    said = read_json(path) if path.is_file() else {}
    if not isinstance(said, Mapping):
        raise DataError(f"{path}: not a mapping; fetch the model anew")
    side = _pixels(said.get("crop_size"), 0)
    shorter = _pixels(said.get("size"), usual_side)
    mean, spread = said.get("image_mean", usual_mean), said.get("image_std", usual_spread)
    if len(mean) != 3 or len(spread) != 3:
        raise DataError(f"{path}: image_mean and image_std are not of three channels")
    cut = side if side and said.get("do_center_crop", True) else shorter
    return Preparation(max(shorter, cut), cut, tuple(mean), tuple(spread))


def _pixels(size: Any, usual: int) -> int:
    """A side in pixels, as a number or as {shortest_edge} or {height, width}."""
    if isinstance(size, Mapping):
        size = size.get("shortest_edge", size.get("height"))
    return size if isinstance(size, int) and size > 0 else usual
