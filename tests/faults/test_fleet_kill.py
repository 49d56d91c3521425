"""A small fleet under fire in every run of the tests; the large one is `make drill-fleet`."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from fleet_drill import Drill


def test_killed_workers_lose_nothing(tmp_path: Path) -> None:
    drill = Drill(tmp_path, subjects=24, steps=8, pack_size=4)
    drill.undisturbed()
    assert drill.killed(workers=2, kills=3, seed=1) >= 1
    assert drill.failures() == []


def test_the_drill_can_fail(tmp_path: Path) -> None:
    drill = Drill(tmp_path, subjects=2, steps=2, pack_size=2)
    drill.undisturbed()
    drill.killed(workers=1, kills=0, seed=0)
    assert drill.failures() == []
    run = tmp_path / "killed/drill"
    log = run / "subjects/s000/metrics.jsonl"
    log.write_text(log.read_text() + json.dumps({"step": 2}) + "\n")
    assert any("s000" in line for line in drill.failures())
    rows = list(csv.reader((run / "fleet.csv").open(newline="")))
    (run / "fleet.csv").write_text("\n".join(",".join(row) for row in rows[:-1]))
    assert any("does not list" in line for line in drill.failures())
