"""The saved states of a subject, from the first copy to the result, put into a base model in turn.

Between a run folder and the `score` command. Invariant: a model holds one state at a time, and
after `put` it is the base with exactly that state in it, whatever was in it before.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from disttrain.config import LoraSettings, RunConfig, TextualInversionSettings
from disttrain.engine.checkpoint import AVERAGE, PARTS, list_checkpoints
from disttrain.errors import DataError, ModelError
from disttrain.files import read_tensors
from disttrain.formats.embedding import read_embedding
from disttrain.models.base import BaseModel, load_base
from disttrain.models.foreign import read_safetensors
from disttrain.models.packed import PackedLoRALinear, PackedTokenEmbedding, replace_layer
from disttrain.models.text import PromptTokenizer, vocabulary_of
from disttrain.review.sample import attach_embedding, attach_lora


@dataclass(frozen=True)
class SavedState:
    """A state on disk: a result file, a model folder, or a checkpoint folder."""

    step: int
    path: Path


def saved_states(config: RunConfig, folder: Path, finished: int | None) -> list[SavedState]:
    """Every state of a subject by step; of one step the result goes before a copy.

    Args:
        folder: the subject's, `subjects/NAME`.
        finished: the step that the result of a model that was trained whole is of; None without
            one.

    Raises:
        ModelError: there is none, or a result that cannot be read.
    """
    name = config.subjects[0].name
    found: dict[int, Path] = {}
    if config.packable:
        for path in sorted((folder / "steps").glob("*.safetensors")):
            match = re.fullmatch(rf"{re.escape(name)}-(\d{{8,}})", path.stem)
            if match:
                found[int(match[1])] = path
        result = folder / f"{name}.safetensors"
        if result.is_file():
            found[_step_in(result)] = result
    else:
        for path in list_checkpoints(folder / "checkpoints"):
            found[int(path.name.removeprefix("step-"))] = path
        if finished is not None and (folder / "model").is_dir():
            found[finished] = folder / "model"
    if not found:
        raise ModelError(f"{folder}: no saved state yet; train the run to its first checkpoint")
    return [SavedState(step, found[step]) for step in sorted(found)]


def _step_in(result: Path) -> int:
    """The step that a result file says it is of."""
    _, _, metadata = read_safetensors(result, ("",))
    text = metadata.get("step") or metadata.get("ss_steps") or ""
    if not text.isdecimal():
        raise ModelError(
            f"{result}: does not say of which step it is; it is no result of disttrain"
        )
    return int(text)


@dataclass(frozen=True)
class InPlace:
    """What drawing with a state that was put in place needs besides the model.

    Of textual inversion `vectors` `[N, width]` and the base's `vocabulary` `[V, width]`, else None.
    """

    tokenizer: PromptTokenizer
    vectors: Tensor | None = None
    vocabulary: Tensor | None = None


def put(config: RunConfig, base: BaseModel, state: SavedState) -> InPlace:
    """Put a state into a base model that may hold another one of the same run.

    Raises:
        ModelError, DataError: damaged, or made for another model.
    """
    if isinstance(config.method, TextualInversionSettings):
        take_out(base)
        vectors = read_embedding(state.path).vectors
        vocabulary = vocabulary_of(base.text_encoder).weight
        return InPlace(attach_embedding(base, vectors), vectors, vocabulary)
    if isinstance(config.method, LoraSettings):
        take_out(base)
        attach_lora(base, state.path)
    elif state.path.name == "model":
        _fill(base, _weights_of(load_base(str(state.path))), state.path)
    else:
        # A result is made of the average where there is one.
        average = state.path / AVERAGE
        weights = read_tensors(average if average.is_file() else state.path / PARTS[0])
        _fill(base, weights, state.path)
    return InPlace(PromptTokenizer(base.tokenizer))


def take_out(base: BaseModel) -> None:
    """Put the base's own layers back where a LoRA or new words were."""
    parts: list[nn.Module] = [base.unet, base.text_encoder]
    for part in parts:
        for name, layer in list(part.named_modules()):
            if isinstance(layer, PackedLoRALinear):
                replace_layer(part, name, layer.base)
    words = base.text_encoder.get_input_embeddings()
    if isinstance(words, PackedTokenEmbedding):
        base.text_encoder.set_input_embeddings(words.base)


def _weights_of(model: BaseModel) -> dict[str, Tensor]:
    parts: dict[str, nn.Module] = {"unet": model.unet, "text_encoder": model.text_encoder}
    return {
        f"{part}.{name}": value
        for part, module in parts.items()
        for name, value in module.named_parameters()
    }


@torch.no_grad()
def _fill(base: BaseModel, weights: dict[str, Tensor], path: Path) -> None:
    """Copy trained weights, by part and name, over the base's own."""
    own = _weights_of(base)
    for name, value in weights.items():
        if name not in own or own[name].shape != value.shape:
            raise DataError(f"{path}: {name} has no place in base_model {base.name}")
        own[name].copy_(value)
