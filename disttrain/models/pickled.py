"""Reading other people's torch files (`.ckpt`, `.pt`, `.bin`) without running what is in them.

Invariant: only torch's restricted unpickler is ever used, within a size limit that counts the
unpacked bytes; whatever goes wrong in it becomes one `ModelError`.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from disttrain.errors import ModelError
from disttrain.models.loading import one_line

# What damaged files were seen to raise inside torch.load, besides UnpicklingError.
DAMAGE = (OSError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError)
DAMAGE += (RuntimeError, AssertionError, OverflowError, MemoryError, zipfile.BadZipFile)


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
        with warnings.catch_warnings():
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
