"""Finding the base model a config names: the first thing a run does.

`tiny`, a diffusers folder, a hub id, or a single `.safetensors` or `.ckpt` file all become the same
`BaseModel`. Invariant: it is float32, in evaluation mode and frozen, however it was stored.
"""

from __future__ import annotations

import re
from pathlib import Path

from disttrain.config import RunConfig
from disttrain.errors import ModelError
from disttrain.models.folder import load_folder, weight_files
from disttrain.models.hub import download
from disttrain.models.local_copy import Say, near, silent
from disttrain.models.parts import BaseModel
from disttrain.models.single_file import load_single_file
from disttrain.models.tiny import load_tiny

__all__ = ["BaseModel", "configured_base", "load_base"]

SINGLE_FILES = (".safetensors", ".ckpt")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load_base(
    spec: str,
    *,
    revision: str | None = None,
    prediction_type: str | None = None,
    say: Say = silent,
    warn: Say = silent,
) -> BaseModel:
    """The base model `spec` names: "tiny", a diffusers folder, a hub id or a single file.

    Args:
        revision: branch, tag or commit of a hub id.
        prediction_type: "epsilon" or "v_prediction"; None takes what the model says of itself (a
            single file says nothing: see `single_file.py` for the rule).
        say, warn: told of a copy on this machine (`local_copy.py`).

    Raises:
        ModelError: missing, unreachable, damaged, or of a kind that is not supported.
    """
    if spec == "tiny":
        return load_tiny(prediction_type)
    path = Path(spec).expanduser()
    weights = [weight_files(part) for part in ("unet", "text_encoder", "vae")]
    if path.is_dir():
        place = near(path, weights, say, warn)
        return load_folder(place, path.resolve().name, prediction_type)
    if path.is_file():
        if path.suffix not in SINGLE_FILES:
            raise ModelError(f"base_model: {spec} is neither a .safetensors nor a .ckpt file")
        return load_single_file(near(path, [], say, warn), prediction_type)
    if path.suffix in SINGLE_FILES or not HUB_ID.fullmatch(spec) or spec.startswith("."):
        raise ModelError(f"base_model: {spec} does not exist")
    folder = download(spec, revision, weights)
    return load_folder(near(folder, weights, say, warn), spec, prediction_type)


def configured_base(config: RunConfig, say: Say = silent, warn: Say = silent) -> BaseModel:
    """The base model a run's settings name; raises `ModelError` as `load_base` does."""
    kind = config.base_prediction_type
    return load_base(
        config.base_model,
        revision=config.base_revision or None,
        prediction_type=None if kind == "auto" else kind,
        say=say,
        warn=warn,
    )
