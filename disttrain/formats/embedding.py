"""Textual inversion files: the new token's vectors, as diffusers and the web UI load them.

Invariant: a file that `write_embedding` leaves behind was read back and holds the same bits it was
given. Reads what others write: diffusers, the web UI, kohya, the original authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from disttrain.errors import ModelError
from disttrain.files import write_bytes
from disttrain.formats.container import file_bytes
from disttrain.models.foreign import read_pickled, read_safetensors

SIZE_LIMIT = 256 * 2**20
PICKLED = (".pt", ".bin", ".pth")
NAMELESS = ("*", "emb_params")  # what the web UI and kohya call the only tensor


@dataclass(frozen=True)
class Embedding:
    """The vectors `[N, width]` (float32, CPU) that a word stands for.

    `name` is the word: the one in the file, or the file's stem where files carry none (kohya).
    `step` is what the file says of its training; the web UI counts from 0.
    """

    name: str
    vectors: Tensor
    step: int | None


def write_embedding(
    path: Path, token: str, vectors: Tensor, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a `.safetensors` file with one float32 tensor `[N, width]` called `token`.

    diffusers' `load_textual_inversion` takes the token from it; the web UI calls the word by the
    file's name. `metadata` may have a `step`.

    Raises:
        ModelError: a number is not finite, or what was read back differs.
    """
    assert token not in ("", "__metadata__"), "a token needs a name"
    assert vectors.ndim == 2, "vectors are [N, width]"
    plain = vectors.detach().float().cpu().contiguous()
    if not bool(torch.isfinite(plain).all()):
        raise ModelError(f"{path}: not written, it has numbers that are not finite")
    write_bytes(path, file_bytes({token: plain}, {"format": "pt", **(metadata or {})}))
    tensors, _, _ = read_safetensors(path)
    if list(tensors) != [token] or not torch.equal(tensors[token], plain):
        path.unlink(missing_ok=True)
        raise ModelError(f"{path}: it was not the same when read back; check the disk")


def read_embedding(path: Path) -> Embedding:
    """The embedding in a `.safetensors`, `.pt`, `.pth` or `.bin` file, whoever wrote it.

    Raises:
        ModelError: damaged, too large, of another kind, or made for SDXL (two text encoders).
    """
    if path.suffix == ".safetensors":
        found, _, metadata = read_safetensors(path)
        return _embedding(path, found, _number(metadata.get("step")))
    if path.suffix not in PICKLED:
        kinds = ", ".join((".safetensors", *PICKLED))
        raise ModelError(f"{path}: an embedding is one of {kinds}")
    found = read_pickled(path, SIZE_LIMIT)
    if isinstance(found, Tensor):
        return _embedding(path, {"*": found}, None)
    if not isinstance(found, Mapping):
        raise ModelError(f"{path}: holds no embedding")
    if "string_to_param" not in found:
        return _embedding(path, found, None)
    step = found.get("step")
    name = found.get("name")
    return _embedding(
        path,
        _plain(path, found["string_to_param"]),
        step if isinstance(step, int) else None,
        name if isinstance(name, str) else "",
    )


def _plain(path: Path, container: Any) -> Mapping[str, Any]:
    if isinstance(container, torch.nn.ParameterDict):
        # Pickled by a torch that kept its entries as parameters of a module, or by a newer one.
        return {**vars(container).get("_parameters", {}), **dict(container.items())}
    if not isinstance(container, Mapping):
        raise ModelError(f"{path}: holds no embedding")
    return container


def _embedding(path: Path, found: Mapping[str, Any], step: int | None, name: str = "") -> Embedding:
    if {"clip_l", "clip_g"} <= found.keys():
        raise ModelError(f"{path}: made for SDXL, which is not supported yet")
    tensors = {str(key): t for key, t in found.items() if isinstance(t, Tensor)}
    if len(tensors) != 1 or len(found) != 1:
        raise ModelError(f"{path}: an embedding has one tensor, this has {len(found)} entries")
    key, tensor = next(iter(tensors.items()))
    if tensor.ndim == 1:
        tensor = tensor[None]
    if tensor.ndim != 2 or 0 in tensor.shape or not tensor.is_floating_point():
        raise ModelError(
            f"{path}: its tensor of shape {tuple(tensor.shape)} is no list of token vectors"
        )
    vectors = tensor.detach().to(torch.float32, copy=True).contiguous()
    if not bool(torch.isfinite(vectors).all()):
        raise ModelError(f"{path}: has numbers that are not finite; it is damaged or diverged")
    return Embedding(name or (path.stem if key in NAMELESS else key), vectors, step)


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None
