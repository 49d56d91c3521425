"""Checkpoints: everything a pack needs to go on as if nothing had happened.

`checkpoints/step-00000500/` holds trainables.safetensors, optimizer.safetensors,
average.safetensors (where optim.ema_decay is set) and state.json with the digests of all and of
itself. Written by rank zero into a temporary folder that is synced and then renamed. Invariant: a
folder named `step-*` is complete, or its digests say that it is damaged;
an older checkpoint is removed only after a newer one is in place. No random state is kept: draws
are functions of the cursor.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from disttrain.errors import CheckpointError, DataError
from disttrain.files import (
    atomic_folder,
    digest_of,
    read_json,
    read_tensors,
    remove_folder,
    sha256_file,
    write_json,
    write_tensors,
)

FORMAT = 2
SECONDS_UNTIL_VISIBLE = 90.0
"""Network file systems may show a folder as it was for up to a minute."""
SEPARATOR = "|"
PARTS = ("trainables.safetensors", "optimizer.safetensors")
AVERAGE = "average.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it lies in memory."""

    state: dict[str, Any]
    trainables: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    average: dict[str, Tensor] = field(default_factory=dict)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a run's step lies."""
    return folder / f"step-{step:08d}"


def write_checkpoint(
    folder: Path, step: int, checkpoint: Checkpoint, keep: int, spared: int | None = None
) -> Path:
    """Write one checkpoint, then remove all older ones but the `keep` newest and that of the step
    that is `spared`.

    A whole one of the same step and state stays: training is deterministic, and replacing a folder
    has a moment at which neither the old nor the new one is there.
    """
    path = checkpoint_path(folder, step)
    if not _holds(path, checkpoint.state):
        with atomic_folder(path) as temporary:
            parts: dict[str, dict[str, Tensor]] = dict(
                zip(PARTS, (checkpoint.trainables, checkpoint.optimizer), strict=True)
            )
            if checkpoint.average:
                parts[AVERAGE] = checkpoint.average
            for name, tensors in parts.items():
                write_tensors(temporary / name, tensors)
            digests = {name: sha256_file(temporary / name) for name in parts}
            state = {"format": FORMAT, **checkpoint.state, "digests": digests}
            write_json(temporary / "state.json", {**state, "digest": digest_of(state)})
    # Any newer one is a damaged one that was passed over: it must not count as kept.
    upto = [found for found in list_checkpoints(folder) if found <= path]
    for old in upto[:-keep]:
        if spared is None or old != checkpoint_path(folder, spared):
            remove_folder(old)
    return path


def _holds(path: Path, state: dict[str, Any]) -> bool:
    try:
        return path.is_dir() and state.items() <= _verified_state(path).items()
    except CheckpointError:
        return False


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name))


def read_checkpoint(path: Path) -> Checkpoint:
    """A verified checkpoint.

    Raises:
        CheckpointError: a part is missing or does not have its digest.
    """
    state = _verified_state(path)
    try:
        trainables, optimizer = (read_tensors(path / name) for name in PARTS)
        average = read_tensors(path / AVERAGE) if AVERAGE in state["digests"] else {}
        return Checkpoint(state, trainables, optimizer, average)
    except DataError as error:
        raise CheckpointError(f"{path}: incomplete ({error})") from error


def read_when_visible(path: Path, seconds: float = SECONDS_UNTIL_VISIBLE) -> Checkpoint:
    """A checkpoint that another process on a shared file system has seen whole.

    Raises:
        CheckpointError: it cannot be read here after so many seconds.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return read_checkpoint(path)
        except CheckpointError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.5)


def _verified_state(path: Path) -> dict[str, Any]:
    """The state of a checkpoint whose parts have their digests."""
    try:
        state = read_json(path / "state.json")
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise CheckpointError(f"{path}: not a checkpoint of this version of disttrain")
        if state.pop("digest", None) != digest_of(state):
            raise CheckpointError(f"{path / 'state.json'}: damaged (its digest is another)")
        for name, digest in state["digests"].items():
            if sha256_file(path / name) != digest:
                raise CheckpointError(f"{path / name}: damaged (its digest is another)")
        return state
    except (DataError, OSError) as error:
        raise CheckpointError(f"{path}: incomplete ({error})") from error


def newest_checkpoint(folder: Path) -> tuple[Path, Checkpoint, list[str]] | None:
    """The newest checkpoint that is whole, and a line for each damaged one that was passed over.

    Raises:
        CheckpointError: there are checkpoints but none is whole.
    """
    damaged = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return path, read_checkpoint(path), damaged
        except CheckpointError as error:
            damaged.append(str(error))
    if damaged:
        raise CheckpointError(f"no usable checkpoint: {'; '.join(damaged)}; use --fresh to restart")
    return None


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: dict[Tensor, str]
) -> dict[str, Tensor]:
    """Optimizer state as `NAME|KEY` tensors; `names` maps parameters to their stable names."""
    return {
        f"{names[parameter]}{SEPARATOR}{key}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: dict[Tensor, str], tensors: dict[str, Tensor]
) -> None:
    """Put saved state back; step counts stay where the optimizer keeps them."""
    parameters = {name: parameter for parameter, name in names.items()}
    for full, value in tensors.items():
        name, key = full.rsplit(SEPARATOR, 1)
        parameter = parameters[name]
        on_device = value.dim() > 0  # torch keeps scalar step counts on the CPU
        placed = value.to(parameter.device) if on_device else value
        optimizer.state[parameter][key] = placed.clone()  # a file's own memory is not aligned


def restore_parameters(parameters: dict[str, Tensor], saved: dict[str, Tensor], path: str) -> None:
    """Copy saved values into trainable tensors.

    Raises:
        CheckpointError: the names or shapes are not those of this run.
    """
    check_same_tensors({name: value.shape for name, value in parameters.items()}, saved, path)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])


def check_same_tensors(shapes: dict[str, torch.Size], saved: dict[str, Tensor], path: str) -> None:
    """CheckpointError unless the saved tensors are those that train, by name and shape."""
    if shapes.keys() != saved.keys():
        raise CheckpointError(f"{path}: holds other tensors than this run trains; use --fresh")
    for name, shape in shapes.items():
        if shape != saved[name].shape:
            raise CheckpointError(f"{path}: {name} has another shape; use --fresh")
