"""Layers with a subject axis: what a pack of subjects trains over one frozen base.

The batch is subject-major: its first `B / S` rows belong to subject 0, the next to subject 1, and
so on. Invariant: the output rows of a subject depend on that subject's parameters only, so each
subject's gradient is its own when the per-subject losses are summed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


class PackedLoRALinear(nn.Module):
    """A frozen linear layer plus one low-rank change per subject (Hu et al. 2021).

    `y = W x + b + alpha / rank * up_s (down_s x)` for the rows of subject s, as two batched
    products. Shapes: down `[S, rank, in]`, up `[S, out, rank]`, x `[S * b, ..., in]`.
    """

    def __init__(self, base: nn.Linear, down: Tensor, up: Tensor, alpha: float) -> None:
        super().__init__()
        subjects, rank, width = down.shape
        assert (subjects, rank) == (up.shape[0], up.shape[2])
        assert (width, up.shape[1]) == (base.in_features, base.out_features)
        self.base = base
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(up)
        self.scale = alpha / rank
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def weight(self) -> Tensor:
        """The frozen weight `[out, in]`: model code asks layers for its dtype and device."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        subjects = self.down.shape[0]
        assert x.shape[0] % subjects == 0, "a packed batch holds as many rows for each subject"
        rows = x.reshape(subjects, -1, self.in_features)
        inner = torch.bmm(rows, self.down.to(x.dtype).transpose(1, 2))
        change = torch.bmm(inner, self.up.to(inner.dtype).transpose(1, 2)) * self.scale
        return self.base(x) + change.reshape(*x.shape[:-1], self.out_features)


class PackedTokenEmbedding(nn.Module):
    """The frozen vocabulary plus a few new rows per subject.

    Ids below `first_id` mean the vocabulary; id `first_id + i` in a row of subject s means
    `rows[s, i]`. Shapes: rows `[S, vectors, width]`, ids `[S * b, length]`. The vocabulary gets no
    gradient and no optimizer state, so none of its rows can drift.
    """

    def __init__(self, base: nn.Embedding, rows: Tensor, first_id: int) -> None:
        super().__init__()
        self.base = base
        self.rows = nn.Parameter(rows)
        self.first_id = first_id

    @property
    def weight(self) -> Tensor:
        """The frozen vocabulary `[V, width]`."""
        return self.base.weight

    def forward(self, ids: Tensor) -> Tensor:
        subjects, vectors, _ = self.rows.shape
        assert ids.shape[0] % subjects == 0, "a packed batch holds as many rows for each subject"
        known = self.base(ids.clamp(max=self.first_id - 1))
        subject = torch.arange(subjects, device=ids.device).repeat_interleave(
            ids.shape[0] // subjects
        )
        place = (ids - self.first_id).clamp(min=0, max=vectors - 1)
        new = self.rows.to(known.dtype)[subject[:, None], place]
        return torch.where((ids >= self.first_id)[..., None], new, known)


def linear_layers(model: nn.Module, targets: tuple[str, ...]) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of `model` whose dotted name ends in one of `targets`, in model order."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and any(
            name == target or name.endswith(f".{target}") for target in targets
        ):
            yield name, layer


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` where `name` points to in `model`."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def placed(module: Module, device: torch.device, dtype: torch.dtype | None = None) -> Module:
    """The module itself, moved; without the type lost that the libraries' own `to` loses."""
    nn.Module.to(module, device, dtype)
    return module
