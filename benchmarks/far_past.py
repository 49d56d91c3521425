"""Does the state that is picked stand up when a run is driven far past its best point?

    python benchmarks/far_past.py --output benchmarks/results/far_past.json

Trains the example subjects five times as long as the configs say. A state is picked
by `disttrain score` as ever; then every state is drawn again with seeds that had no part in that,
and the picked one's fidelity to the held-out pictures is compared with the highest of all, and with
the last state's. Nothing is chosen by hand: every run that was started is in the table.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from fidelity import METHODS, run_tree

from disttrain.config_file import parse_config
from disttrain.engine.train import train
from disttrain.files import write_json
from disttrain.review.score import ScoreRequest, SubjectScores, score

TIMES = 5
STATES = 10
OTHER_SEED = 1_000_000
SHARE = 0.95


def long_tree(method: str, steps: int | None, output: Path) -> dict[str, Any]:
    """The settings of one run that goes too far."""
    tree = run_tree(method, 0, None, output)
    most = TIMES * tree["train"]["max_steps"] if steps is None else steps
    tree["train"] |= {"max_steps": most, "checkpoint_every": max(1, most // STATES)}
    tree["train"]["keep_checkpoints"] = STATES + 1
    return tree


def row_of(chosen: SubjectScores, again: SubjectScores) -> dict[str, Any]:
    """What became of the picked state of one subject."""
    fidelity = {reading.step: reading.scores.subject for reading in again.readings}
    error = {reading.step: reading.scores.subject_error for reading in again.readings}
    best = max(fidelity, key=lambda step: fidelity[step])
    picked = chosen.verdict.best_step
    return {
        "subject": chosen.name,
        "before": again.before.subject,
        "picked_step": picked,
        "picked": fidelity[picked],
        "best_step": best,
        "best": fidelity[best],
        "best_error": error[best],
        "last": again.readings[-1].scores.subject,
        "share": fidelity[picked] / fidelity[best] if fidelity[best] > 0 else 0.0,
        "flags": sorted({flag.kind for flag in chosen.verdict.flags}),
    }


def main() -> None:
    """Command line: results as a table, and as JSON."""
    parser = argparse.ArgumentParser(description="Whether the picked state stands up.")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS)[:2])
    parser.add_argument("--steps", type=int, help=f"other than {TIMES} times the configs'")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print("| method | subject | picked | fidelity | best | fidelity | share | last | flags |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for method in arguments.methods:
            config = parse_config(long_tree(method, arguments.steps, Path(folder)))
            started = time.monotonic()
            train(config)
            run = Path(folder) / config.name
            found = list(score(run, ScoreRequest()))
            others = score(run, ScoreRequest(seed=OTHER_SEED))
            for chosen, again in zip(found, others, strict=True):
                row = {"method": method, **row_of(chosen, again)}
                rows.append(row)
                print(
                    f"| {method} | {row['subject']} | {row['picked_step']} | {row['picked']:.3f} "
                    f"| {row['best_step']} | {row['best']:.3f} | {row['share']:.2f} "
                    f"| {row['last']:.3f} | {', '.join(row['flags'])} |",
                    flush=True,
                )
            print(f"{method}: {time.monotonic() - started:.0f} s", flush=True)
    shares = [row["share"] for row in rows]
    fine = sum(share >= SHARE for share in shares)
    print(f"{fine} of {len(rows)} within {1 - SHARE:.0%}; mean share {statistics.mean(shares):.3f}")
    if arguments.output:
        write_json(arguments.output, {"rows": rows})


if __name__ == "__main__":
    main()
