"""Is a subject's result the same from one process, from two, and in a pack of eight?

    python benchmarks/same_result.py --output benchmarks/results/same_result.json

Trains the fox of configs/lora.yaml three times: alone, alone on two processes, and beside seven
other subjects. Printed for each: fidelity to the held-out pictures, and how far its weights are
from the first one's: the largest difference, and all as a share of what was learned. Exit code 1
if weights of the pack differ by more than 1e-4, or a fidelity by more than its standard error.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from fidelity import ROOT, subjects_for

from disttrain import schema
from disttrain.files import read_tensors, write_json
from disttrain.review.score import ScoreRequest, score

FOX = "fox"
ALLOWED = 1e-4


def tree_of(name: str, output: Path, steps: int | None) -> dict[str, Any]:
    """The example config, its run in a folder of its own."""
    tree = schema.read_mapping(ROOT / "configs/lora.yaml")
    tree |= {"name": name, "output_dir": str(output)}
    tree["subjects"] = [s for s in subjects_for("lora") if s["name"] == FOX]
    if steps is not None:
        tree["train"] |= {"max_steps": steps, "checkpoint_every": steps}
    tree["train"]["sample_every"] = 0
    tree["data"]["global_batch_size"] = tree["data"]["batch_size"]  # also of two processes
    return tree


def train_run(tree: dict[str, Any], *launch: str) -> Path:
    """Train a tree in processes of its own; returns the run folder."""
    output = Path(tree["output_dir"])
    path = output / f"{tree['name']}.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    words = [sys.executable, "-m", "disttrain", *(launch or ("train",))]
    command = [*words[:4], str(path), *words[4:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return output / tree["name"]


def compare(first: Path, other: Path) -> tuple[float, float]:
    """The largest difference of two results, and their distance by the first one's length."""
    left, right = (
        read_tensors(run / f"subjects/{FOX}/{FOX}.safetensors") for run in (first, other)
    )
    assert left.keys() == right.keys()
    largest = max(float((left[k] - right[k]).abs().max()) for k in left)
    apart = sum(float((left[k] - right[k]).double().pow(2).sum()) for k in left)
    length = sum(float(left[k].double().pow(2).sum()) for k in left)
    return largest, (apart / length) ** 0.5


def main() -> None:
    """Command line: results as a table, and as JSON."""
    parser = argparse.ArgumentParser(description="One result, however many train it.")
    parser.add_argument("--steps", type=int, help="other than the config's")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone, two, pack = (
            tree_of(word, folder, arguments.steps) for word in ("alone", "two", "pack")
        )
        others = [s for s in subjects_for("lora") if s["name"] != FOX]
        others += [{**one, "name": f"{one['name']}-again"} for one in others[:3]]
        pack["subjects"] = [*others[:4], *pack["subjects"], *others[4:]]
        runs = {
            "1 process": train_run(alone),
            "2 processes": train_run(two, "launch", "--nproc", "2"),
            f"pack of {len(pack['subjects'])}": train_run(pack),
        }
        rows: list[dict[str, Any]] = []
        before = 0.0
        for how, run in runs.items():
            (found,) = score(run, ScoreRequest(subject=FOX))
            before, last = found.before.subject, found.readings[-1].scores
            largest, share = compare(runs["1 process"], run)
            rows.append(
                {
                    "how": how,
                    "fidelity": last.subject,
                    "standard_error": last.subject_error,
                    "largest_difference": largest,
                    "relative_difference": share,
                }
            )
            print(
                f"{how:12} fidelity {last.subject:.4f} +- {last.subject_error:.4f}, "
                f"weights differ by {largest:.1e} at most, {share:.1e} of their length"
            )
    if arguments.output:
        write_json(arguments.output, {"before": before, "rows": rows})
    first = rows[0]
    near = [abs(r["fidelity"] - first["fidelity"]) <= first["standard_error"] for r in rows]
    sys.exit(0 if all(near) and rows[-1]["largest_difference"] <= ALLOWED else 1)


if __name__ == "__main__":
    main()
