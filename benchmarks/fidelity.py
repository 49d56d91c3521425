"""Are subjects learned? Every example subject, by every method, with three seeds.

    python benchmarks/fidelity.py --output benchmarks/results/fidelity.json
    python benchmarks/fidelity.py --methods LoRA --seeds 1 --steps 20        # a quick look

Trains each method's example config, changed as METHODS says, on the five example subjects and
scores every saved state against the held-out pictures. A row of the table is a method and a
subject: fidelity of the base drawing the class, fidelity of the picked state, their difference as
mean and spread over the seeds, and the drift of the class in that state and in the last one.
Nothing is chosen by hand: every run that was started is in the table.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from disttrain import schema
from disttrain.config_file import parse_config
from disttrain.engine.train import train
from disttrain.files import write_json
from disttrain.review.score import ScoreRequest, SubjectScores, score

ROOT = Path(__file__).parent.parent
KINDS = {
    "fox": "animal face",
    "penguin": "bird",
    "dolphin": "sea animal",
    "octopus": "sea animal",
    "dragon": "reptile",
}
"""What each subject is, in a word that the embedded base knows."""
WORDS = {"fox": "sks", "penguin": "olis", "dolphin": "shs", "octopus": "hta", "dragon": "ohwx"}
METHODS: dict[str, tuple[str, list[str]]] = {
    "textual inversion": ("textual_inversion", ["method.init_text=animal"]),
    "LoRA": ("lora", []),
    "DreamBooth": ("dreambooth", ["method.num_class_images=24"]),
    "DreamBooth without prior": ("dreambooth", ["method.num_class_images=0"]),
}
"""A row's name, the config it is made of, and what is changed in it."""


def subjects_for(config: str) -> list[dict[str, Any]]:
    """The example subjects as the config of a method wants them."""
    inverted = config == "textual_inversion"
    return [
        {
            "name": subject,
            "images": str(ROOT / "examples/subjects" / subject),
            "held_out": str(ROOT / "examples/held_out" / subject),
            "token": f"<{subject}>" if inverted else WORDS[subject],
            "class_name": kind,
            "instance_prompt": "a photo of {token}" + ("" if inverted else " {class_name}"),
        }
        for subject, kind in KINDS.items()
    ]


def run_tree(method: str, seed: int, steps: int | None, output: Path) -> dict[str, Any]:
    """The settings of one run: all example subjects, a method, a seed."""
    name, changes = METHODS[method]
    tree = schema.apply_overrides(schema.read_mapping(ROOT / "configs" / f"{name}.yaml"), changes)
    tree["subjects"] = subjects_for(name)
    tree |= {"name": f"{method} {seed}".replace(" ", "-").lower(), "seed": seed}
    tree["output_dir"] = str(output)
    if steps is not None:
        tree["train"] |= {"max_steps": steps, "checkpoint_every": max(1, steps // 2)}
    tree["train"]["sample_every"] = 0
    return tree


def row_of(found: SubjectScores) -> dict[str, Any]:
    """The numbers of one subject of one run."""
    picked = next(r for r in found.readings if r.step == found.verdict.best_step)
    highest = max(r.scores.subject for r in found.readings)
    return {
        "subject": found.name,
        "before": found.before.subject,
        "after": picked.scores.subject,
        "picked_step": picked.step,
        "highest": highest,
        "last": found.readings[-1].scores.subject,
        "drift": picked.scores.drift,
        "drift_at_end": found.readings[-1].scores.drift,
        "prompt": picked.scores.prompt,
    }


def spread(values: list[float]) -> str:
    """Mean and standard deviation, for a table."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} +- {deviation:.3f}"


def table_of(rows: list[dict[str, Any]]) -> list[str]:
    """The table in Markdown: means over seeds."""
    lines = [
        "| method | subject | base draws the class | taught | gain | class drift | at the end |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        for subject in KINDS:
            own = [r for r in rows if (r["method"], r["subject"]) == (method, subject)]
            if own:
                gains = [r["after"] - r["before"] for r in own]
                cells = [spread([r[key] for r in own]) for key in ("before", "after")]
                cells.append(spread(gains))
                cells += [spread([r[key] for r in own]) for key in ("drift", "drift_at_end")]
                lines.append(f"| {method} | {subject} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Command line: results as JSON, and as a table on the terminal."""
    parser = argparse.ArgumentParser(description="Whether the example subjects are learned.")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3, help="how many, default 3")
    parser.add_argument("--steps", type=int, help="other than the configs'")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for method in arguments.methods:
            for seed in range(arguments.seeds):
                started = time.monotonic()
                config = parse_config(run_tree(method, seed, arguments.steps, Path(folder)))
                train(config)
                run = Path(folder) / config.name
                found = [row_of(scores) for scores in score(run, ScoreRequest())]
                rows += [{"method": method, "seed": seed, **row} for row in found]
                print(f"{method}, seed {seed}: {time.monotonic() - started:.0f} s", flush=True)
                if arguments.output:
                    write_json(arguments.output, {"rows": rows})
    print("\n".join(table_of(rows)))


if __name__ == "__main__":
    main()
