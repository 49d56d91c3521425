"""Reading other people's weight files without running what is in them.

Invariant: `.ckpt`, `.pt` and `.bin` files only ever meet torch's restricted unpickler, within a
size limit that counts the unpacked bytes; whatever goes wrong becomes one `ModelError`.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from disttrain.errors import ModelError
from disttrain.models.loading import one_line

# What damaged files were seen to raise inside torch.load, besides UnpicklingError.
DAMAGE = (OSError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError)
# A plain container of weights, found in the first textual inversion files.
HARMLESS: list[Any] = [torch.nn.ParameterDict]
DAMAGE += (RuntimeError, AssertionError, OverflowError, MemoryError, zipfile.BadZipFile)


def read_safetensors(
    path: Path, prefixes: tuple[str, ...] = ("",)
) -> tuple[dict[str, torch.Tensor], set[str], dict[str, str]]:
    """The tensors whose names start with one of `prefixes`, the names of all, and the metadata.

    Raises:
        ModelError: missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as archive:
            names = sorted(archive.keys())
            chosen = {n: archive.get_tensor(n) for n in names if n.startswith(prefixes)}
            return chosen, set(names), archive.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read ({one_line(error)})") from error


def read_pickled(path: Path, limit: int) -> Any:
    """What `torch.save` wrote to `path`: tensors and plain containers, on the CPU.

    Args:
        limit: the most bytes the file may have, packed or unpacked.

    Raises:
        ModelError: missing, damaged, too large, or holding objects other than those.
    """
    try:
        size = path.stat().st_size
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                size = max(size, sum(member.file_size for member in archive.infolist()))
        if size > limit:
            raise ModelError(f"{path}: {size} bytes, the limit is {limit}")
        with warnings.catch_warnings(), torch.serialization.safe_globals(HARMLESS):
            warnings.simplefilter("ignore")  # about the age of the file; it loads or it does not
            return torch.load(path, map_location="cpu", weights_only=True)
    except ModelError:
        raise
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            raise ModelError(
                f"{path}: holds objects other than tensors, which could run code; convert it to"
                " .safetensors with a tool you trust"
            ) from error
        raise ModelError(f"{path}: damaged ({one_line(error)})") from error
    except DAMAGE as error:
        raise ModelError(f"{path}: cannot be read ({one_line(error)})") from error
