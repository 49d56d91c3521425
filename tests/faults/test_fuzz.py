"""Random damage to shards, pictures, captions and indexes: one line, no hang, no altered picture.

The cases run in one process of their own (`fuzz_run.py`), so that a crash there is a failure here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_command
from fuzz_twins import TWINS

FOLDER = Path(__file__).parent
SEED = 11


def fuzz(folder: Path, *arguments: str, timeout: float) -> dict[str, Any]:
    result = run_command(
        sys.executable,
        FOLDER / "fuzz_run.py",
        folder / "fuzz",
        "--seed",
        str(SEED),
        *arguments,
        timeout=timeout,
        PYTHONPATH=f"{ROOT / 'tests'}",
    )
    last = "\n".join(result.stderr.splitlines()[-20:])
    assert result.returncode == 0, f"crashed, seed {SEED}: {last}"
    return json.loads(result.stdout)


def check(found: dict[str, Any], cases: int) -> None:
    assert not found["failures"], "\n".join(found["failures"])
    assert found["growth MiB"] < 200
    assert found["slowest seconds"] < 2
    counts = found["counts"]
    for what in ("opening", "loading", "indexing", "packing", "reading captions", "masks"):
        both = counts.get(f"{what} worked", 0), counts.get(f"{what} refused", 0)
        assert min(both) >= cases / 50, f"{what} worked {both[0]}, was refused {both[1]} times"


def test_160_harmed_inputs(tmp_path: Path) -> None:
    check(fuzz(tmp_path, "--count", "160", timeout=120), 160)


@pytest.mark.slow
def test_1000_harmed_inputs(tmp_path: Path) -> None:
    check(fuzz(tmp_path, "--first", "160", "--count", "1000", timeout=300), 1000)


def test_planted_defects_are_caught(tmp_path: Path) -> None:
    found = fuzz(tmp_path, "--count", "160", "--twins", timeout=240)
    assert found.keys() == {twin.__name__ for twin in TWINS}
    for twin, sign in TWINS.items():
        failures = found[twin.__name__]
        assert any(sign in line for line in failures), f"{twin.__name__}: {failures[:5]}"
