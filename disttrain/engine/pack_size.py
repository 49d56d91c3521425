"""How many subjects a worker trains together: `fleet.pack_size: auto`.

Before a worker's first pack. Invariant: asking changes nothing that trains.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from disttrain.engine.pack import Pack

MOST = 32
"""Beyond this a pack is hardly faster and a failure costs more."""
SHARE = 0.5
"""Of the free memory that subjects may take; the rest is for pictures, previews and others."""
COPIES = 4
"""Of each trainable number: weight, gradient, and the optimizer's two moments."""


def fitting_size(pack: Pack, workers: int) -> int:
    """The largest pack that memory allows, from what one trial step of this pack keeps.

    Args:
        pack: of any size, with its data; its weights are not touched.
        workers: processes that share this machine's memory (on a GPU each has its own).
    """
    each = bytes_per_subject(pack)
    return max(1, min(MOST, int(_free_bytes(pack.mesh.device) * SHARE / each)) // max(1, workers))


def bytes_per_subject(pack: Pack) -> int:
    """Memory that each subject of a pack takes: its tensors, and what a step keeps for backward."""
    kept = 0
    frozen = {p.untyped_storage().data_ptr() for p in pack.denoiser.parameters()}
    seen: set[int] = set()

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        place = tensor.untyped_storage().data_ptr()
        if place not in frozen and place not in seen:
            seen.add(place)
            kept += tensor.untyped_storage().nbytes()
        return tensor.detach()  # itself it would hold its own graph for ever

    with saved_tensors_hooks(count, lambda tensor: tensor), pack.mesh.autocast():
        losses = pack.losses(0)
    del losses
    own = sum(value.numel() * value.element_size() for value in pack.parameters.values())
    return (kept + COPIES * own) // len(pack.slots)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
