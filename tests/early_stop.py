"""Scores planted by name and step, for tests of what follows from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import small_config

from disttrain.engine.examiner import Examiner
from disttrain.engine.scores import Scores
from disttrain.engine.slot import Slot

RISE_AND_FALL = {2: 0.3, 4: 0.6, 6: 0.4, 8: 0.35, 10: 0.3, 12: 0.25}
"""Best at step 4, over-trained from step 6 on."""
RISE = {2: 0.2, 4: 0.3, 6: 0.4, 8: 0.5, 10: 0.6, 12: 0.7}


def plant(
    patch: pytest.MonkeyPatch,
    curves: dict[str, dict[int, float]],
    seen: Callable[[Slot], None] = lambda slot: None,
) -> None:
    """Subjects have the subject fidelity of their curve; nothing is drawn."""

    def examine(self: Examiner, pack: Any, slots: Sequence[Slot]) -> list[Scores]:
        found = []
        for slot in slots:
            seen(slot)
            found.append(Scores(curves[slot.name][slot.step], 0.01, 0.5, 0.0))
        return found

    patch.setattr(Examiner, "check", lambda self, config: None)
    patch.setattr(Examiner, "know", lambda self, member: "planted")
    patch.setattr(Examiner, "admit", lambda self, pack, slots: None)
    patch.setattr(Examiner, "examine", examine)


def early_config(method: str, output: Path, **train: Any) -> dict[str, Any]:
    """A run of up to 12 steps, scored at every second one."""
    usual = {"max_steps": 12, "checkpoint_every": 2, "early_stop": True, "early_stop_patience": 2}
    tree = small_config(method, output, **{**usual, **train})
    tree["subjects"][0]["held_out"] = "examples/held_out/fox"
    tree["data"]["batch_size"] = 2
    tree["score"] = {"pictures": 2, "steps": 1}
    return tree
