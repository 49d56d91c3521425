"""The disttrain command with something changed on its ranks. Not a test: test_placement_ranks runs
and test_early_stop_ranks run it in several processes.

    rank_probe.py memory train ...   prints the tensor memory that is left after each subject
    rank_probe.py stale train ...    rank 1 sees checkpoint folders as they were before the newest
    rank_probe.py planted train ...  rank 0 alone gets scores, the best of them at step 4
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from disttrain.engine import checkpoint
from disttrain.engine.distributed import Mesh
from disttrain.engine.examiner import Examiner
from disttrain.engine.scores import Scores
from disttrain.engine.slot import Slot


def live_bytes() -> int:
    """Of all tensors that Python knows of, each memory counted once."""
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            storage = getattr(thing, "_local_tensor", thing).untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def tell_memory() -> None:
    """Print it after each release, on rank zero."""
    release = Mesh.release

    def told(self: Mesh) -> None:
        release(self)
        if self.is_main:
            print(f"left: {live_bytes()} bytes", flush=True)

    Mesh.release = told


def see_old_folders() -> None:
    """As a network file system with a cache shows them."""
    listed = checkpoint.list_checkpoints

    def old(folder: Path) -> list[Path]:
        return listed(folder)[:-1]

    checkpoint.list_checkpoints = old


def fall_after_four(step: int) -> float:
    """Subject fidelity at a step."""
    return round(0.9 - 0.1 * abs(step - 4), 1)


def plant_scores() -> None:
    """Pictures are drawn for real before the first step only."""

    def measured(self: Examiner, pack: Any, slots: Sequence[Slot]) -> list[Scores]:
        if not self.mesh.is_main:
            raise AssertionError("a rank other than zero was asked to measure")
        return [Scores(fall_after_four(slot.step), 0.01, 0.5, 0.0) for slot in slots]

    Examiner._measure = measured


if __name__ == "__main__":
    what = sys.argv.pop(1)
    if what == "memory":
        tell_memory()
    elif what == "planted":
        plant_scores()
    elif os.environ["RANK"] == "1":
        see_old_folders()
    from disttrain.cli import main

    sys.exit(main())
