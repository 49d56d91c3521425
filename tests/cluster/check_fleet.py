"""A fleet as an array over two hosts, of which one loses its power: every subject once."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import yaml
from jobs import FLEET, Job, job_environment, submit
from lab import ROOT, Lab, wait_until
from trees import TOLERANCE

SUBJECTS, TASKS, STEPS = 24, 4, 40
EXAMPLES = ("fox", "penguin", "octopus", "dolphin", "dragon")


def write_fleet(folder: Path) -> dict[str, int]:
    """Manifest and config; returns the steps of each subject."""
    rows = [
        {
            "name": f"s{i:02d}",
            "images": str(ROOT / "examples/subjects" / EXAMPLES[i % 5]),
            "token": f"<s{i:02d}>",
            "seed": i,
            "train.max_steps": STEPS + i % 3,
        }
        for i in range(SUBJECTS)
    ]
    config = {
        "name": "fleet",
        "output_dir": str(folder / "cut"),
        "method": {"name": "textual_inversion", "num_vectors": 2, "init_text": "animal"},
        "data": {"resolution": 64, "batch_size": 2},
        "optim": {"learning_rate": 5e-3, "scale_lr": "none"},
        "train": {"max_steps": STEPS, "checkpoint_every": 10},
        "fleet": {"pack_size": 3, "lease_seconds": 15},
    }
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "manifest.yaml").write_text(yaml.safe_dump(rows))
    return {row["name"]: row["train.max_steps"] for row in rows}


def undisturbed(folder: Path) -> Path:
    """The same fleet by one worker in peace."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "disttrain", "fleet", folder / "manifest.yaml"),
            *(folder / "config.yaml", f"output_dir={folder / 'whole'}", "fleet.pack_size=24"),
        ],
        env=job_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder / "whole/fleet"


def finished(run: Path) -> int:
    """Subjects with a result."""
    return sum((path / f"{path.name}.safetensors").is_file() for path in run.glob("subjects/s*"))


def failures(run: Path, whole: Path, steps: dict[str, int], said: str) -> list[str]:
    """Everything that is not as if no host had been lost."""
    from disttrain.files import read_tensors

    found = []
    with (run / "fleet.csv").open(newline="") as handle:
        table = {row["name"]: row for row in csv.DictReader(handle)}
    if list(table) != list(steps):
        found.append("fleet.csv does not list every subject once")
    times = Counter(re.findall(r"^finished (\S+):", said, re.MULTILINE))
    for name, wanted in steps.items():
        row = table.get(name, {})
        if row.get("status") != "finished" or row.get("steps") != str(wanted):
            found.append(f"{name}: {row}")
            continue
        if times[name] > 1:
            found.append(f"{name}: finished {times[name]} times")
        lines = (run / "subjects" / name / "metrics.jsonl").read_text().splitlines()
        if [json.loads(line)["step"] for line in lines] != list(range(1, wanted + 1)):
            found.append(f"{name}: its log does not hold each step once")
        result = Path("subjects") / name / f"{name}.safetensors"
        left, right = read_tensors(run / result), read_tensors(whole / result)
        gap = max((left[key] - right[key]).abs().max().item() for key in right)
        if not gap < TOLERANCE:
            found.append(f"{name}: {gap:.1e} away from the undisturbed result")
    if list((run / "claims").glob("*.json")):
        found.append("claims are left")
    return found


def test_every_subject_is_finished_once_although_a_host_is_lost(whole_lab: Lab) -> None:
    lab = whole_lab
    folder = lab.share / "fleet"
    steps = write_fleet(folder)
    run = folder / "cut/fleet"
    options = [f"--array=0-{TASKS - 1}", "--exclude=node3", "--ntasks-per-node=1"]
    options += ["--cpus-per-task=2"]
    words = [folder / "manifest.yaml", folder / "config.yaml"]
    array = submit(lab, FLEET, *words, options=options)
    tasks = [array.task(number) for number in range(TASKS)]
    wait_until("three subjects are finished", lambda: finished(run) >= 3, 120)
    on_lost = [task for task in tasks if task.field("BatchHost") == "node2"]
    assert len(on_lost) == 2, "two tasks on each host"
    lab.off("node2")
    done_at_cut = finished(run)
    assert done_at_cut < SUBJECTS, "the fleet ended before the power was cut"
    wait_until("SLURM notices", lambda: all(task.restarts == 1 for task in on_lost), 120)
    lab.on("node2")
    for task in tasks:
        task.finish(180)
    assert [task.restarts for task in tasks if task not in on_lost] == [0, 0]
    whole = undisturbed(folder)
    assert not failures(run, whole, steps, "\n".join(said(task) for task in tasks))


def said(task: Job) -> str:
    """Its log, with what a cut may have left of a line ended."""
    return task.text.replace("\r", "\n")
