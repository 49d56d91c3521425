"""Configs of the checks, what runs left behind, and how far two runs are apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import checkpoints, small_config, write_config
from lab import LabError, wait_until

TOLERANCE = 1e-4
PICTURES = 4
"""Of one optimizer step, over all processes."""


def config_file(method: str, folder: Path, **train: Any) -> Path:
    """A run of few steps whose pictures a step do not depend on the number of processes."""
    tree = small_config(method, folder, **train)
    tree["data"] |= {"batch_size": PICTURES, "global_batch_size": PICTURES}
    return write_config(tree, folder / f"{method}.yaml")


def tensors_apart(left: Path, right: Path) -> float:
    """Largest difference of any number in what two runs trained and exported."""
    from disttrain.files import read_tensors

    pairs = [
        tuple(checkpoints(run)[-1] / "trainables.safetensors" for run in (left, right)),
    ]
    results = {
        path.relative_to(right)
        for path in (right / "subjects").rglob("*.safetensors")
        if "checkpoints" not in path.parts and "steps" not in path.parts
    }
    assert results, f"{right} has no result"
    pairs += [(left / name, right / name) for name in sorted(results)]
    worst = 0.0
    for one, other in pairs:
        mine, theirs = read_tensors(one), read_tensors(other)
        assert mine.keys() == theirs.keys(), f"{one} and {other} hold different tensors"
        gaps = [(mine[key].float() - theirs[key].float()).abs().max().item() for key in theirs]
        worst = max([worst, *gaps])
    return worst


def losses(run: Path, subject: str = "") -> list[float]:
    """The loss of each step, each once and in order."""
    file = run / "subjects" / subject / "metrics.jsonl" if subject else run / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def same_run(left: Path, right: Path) -> None:
    """Two runs took the same steps and ended alike.

    Raises:
        AssertionError: with how far they are apart.
    """
    gap = tensors_apart(left, right)
    assert gap < TOLERANCE, f"{left} is {gap:.1e} away from {right}"
    mine, theirs = losses(left), losses(right)
    assert len(mine) == len(theirs)
    worst = max(abs(a - b) / abs(b) for a, b in zip(mine, theirs, strict=True))
    assert worst < TOLERANCE, f"losses of {left} are {worst:.1e} away from {right}"


def steps_taken(run: Path) -> int:
    """How many steps a run has logged."""
    try:
        return (run / "metrics.jsonl").read_text().count("\n")
    except OSError:
        return 0


def wait_step(run: Path, step: int, seconds: float, explain: Callable[[], str]) -> None:
    """Until a run has logged this step.

    Raises:
        LabError: with what `explain` says.
    """
    try:
        wait_until(f"step {step} of {run.name}", lambda: steps_taken(run) >= step, seconds)
    except LabError as error:
        raise LabError(f"{error}\n{explain()[-6000:]}") from error


def world_of(run: Path) -> int:
    """Processes that the run was last started with."""
    return json.loads((run / "environment.json").read_text())["world_size"]
