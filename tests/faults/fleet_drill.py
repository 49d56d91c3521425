"""Workers of a fleet killed at random moments: every subject is finished once, as if undisturbed.

    python tests/faults/fleet_drill.py --subjects 200 --workers 4 --kills 20

Prints what it sees and ends with "N passed, N failed".
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ("fox", "penguin", "octopus", "dolphin", "dragon")
TOLERANCE = 1e-4


class Drill:
    """One fleet in a folder of its own, and the same fleet undisturbed."""

    def __init__(self, folder: Path, subjects: int, steps: int, pack_size: int) -> None:
        self.folder, self.subjects = folder, subjects
        rows = [
            {
                "name": f"s{i:03d}",
                "images": str(ROOT / "examples/subjects" / EXAMPLES[i % 5]),
                "token": f"<s{i:03d}>",
                "seed": i,
                "train.max_steps": steps + i % 3,
            }
            for i in range(subjects)
        ]
        self.steps = {row["name"]: row["train.max_steps"] for row in rows}
        config = {
            "name": "drill",
            "output_dir": str(folder / "killed"),
            "method": {"name": "textual_inversion", "num_vectors": 2, "init_text": "animal"},
            "data": {"resolution": 64, "batch_size": 2},
            "optim": {"learning_rate": 5e-3, "scale_lr": "none"},
            "train": {"max_steps": steps, "checkpoint_every": 2},
            "fleet": {"pack_size": pack_size, "lease_seconds": 20},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "manifest.yaml").write_text(yaml.safe_dump(rows))
        self.logs = 0

    def worker(self, output: str) -> subprocess.Popen[bytes]:
        """One more worker; what it says goes to a file."""
        self.logs += 1
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "disttrain", "fleet", str(self.folder / "manifest.yaml")]
        command += [str(self.folder / "config.yaml"), f"output_dir={self.folder / output}"]
        with (self.folder / f"{output}-{self.logs:03d}.log").open("wb") as log:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    def undisturbed(self) -> None:
        """The same fleet by one worker in peace."""
        assert self.worker("whole").wait() == 0

    def killed(self, workers: int, kills: int, seed: int, seconds: float = 900) -> int:
        """Workers, of which one is killed and replaced now and then; returns how many were."""
        draw = random.Random(seed)
        alive = [self.worker("killed") for _ in range(workers)]
        done, deadline = 0, time.monotonic() + seconds
        due = time.monotonic() + draw.uniform(4, 9)
        while any(process.poll() is None for process in alive):
            assert time.monotonic() < deadline, "the fleet does not come to its end"
            time.sleep(0.05)
            if done < kills and time.monotonic() >= due:
                number = draw.randrange(len(alive))
                alive[number].send_signal(signal.SIGKILL)
                alive[number].wait()
                alive[number] = self.worker("killed")
                done += 1
                due = time.monotonic() + draw.uniform(0.5, 6)
        codes = [process.returncode for process in alive]
        assert set(codes) <= {0}, codes
        # Workers that found nothing to claim may have left while another was killed.
        assert self.worker("killed").wait() == 0
        return done

    def failures(self) -> list[str]:
        """Everything that is not as it would have been."""
        from disttrain.files import read_tensors

        found: list[str] = []
        run, whole = self.folder / "killed/drill", self.folder / "whole/drill"
        with (run / "fleet.csv").open(newline="") as handle:
            table = {row["name"]: row for row in csv.DictReader(handle)}
        if list(table) != list(self.steps):
            found.append("fleet.csv does not list every subject once")
        said: Counter[str] = Counter()
        for log in self.folder.glob("killed-*.log"):
            text = log.read_text(errors="replace")
            said.update(line.split()[1] for line in text.splitlines() if line[:9] == "finished ")
            if "Traceback" in text:
                found.append(f"{log.name}: a traceback")
        for name, steps in self.steps.items():
            row = table.get(name, {})
            if row.get("status") != "finished" or row.get("steps") != str(steps):
                found.append(f"{name}: {row}")
                continue
            if said[f"{name}:"] > 1:
                found.append(f"{name}: finished {said[f'{name}:']} times")
            lines = (run / "subjects" / name / "metrics.jsonl").read_text().splitlines()
            if [json.loads(line)["step"] for line in lines] != list(range(1, steps + 1)):
                found.append(f"{name}: its log does not hold each step once")
            result = Path("subjects") / name / f"{name}.safetensors"
            left, right = read_tensors(run / result), read_tensors(whole / result)
            gap = max((left[key] - right[key]).abs().max().item() for key in right)
            if not gap <= TOLERANCE:
                found.append(f"{name}: {gap:.1e} away from the undisturbed result")
        if list((run / "claims").glob("*.json")):
            found.append("claims are left")
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--subjects", type=int, default=200)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--pack-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        drill = Drill(Path(name), options.subjects, options.steps, options.pack_size)
        started = time.monotonic()
        drill.undisturbed()
        print(f"undisturbed: {time.monotonic() - started:.0f} s", flush=True)
        started = time.monotonic()
        kills = drill.killed(options.workers, options.kills, options.seed)
        print(f"{options.workers} workers, {kills} killed: {time.monotonic() - started:.0f} s")
        failures = drill.failures()
    for line in failures:
        print(line)
    failed = len({line.partition(":")[0] for line in failures})
    print(f"{options.subjects - failed} passed, {failed} failed")
    sys.exit(bool(failures) or kills < options.kills)


if __name__ == "__main__":
    main()
