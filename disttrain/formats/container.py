"""Tensors and metadata as the bytes of a safetensors file, the same bytes every time.

The library writes its metadata in an order that changes from call to call, so two equal runs would
leave files of different digests. Invariant: equal input gives equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from safetensors.torch import save
from torch import Tensor

LENGTH = 8  # bytes of the number that says how long the header is; the header is padded to it too


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """The file's body alone: the tensors, without the header (what `sshs_model_hash` covers)."""
    return _split(save(dict(tensors)))[1]


def file_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A complete safetensors file, its metadata sorted by name. Tensors lie on the CPU."""
    header, body = _split(save(dict(tensors)))
    listed = {"__metadata__": dict(sorted(metadata.items())), **json.loads(header)}
    text = json.dumps(listed, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % LENGTH)
    return len(text).to_bytes(LENGTH, "little") + text + body


def _split(content: bytes) -> tuple[bytes, bytes]:
    end = LENGTH + int.from_bytes(content[:LENGTH], "little")
    return content[LENGTH:end], content[end:]
