"""Runs the checks of this folder on a SLURM cluster that it builds on this machine.

    python tests/cluster/run_checks.py [-k WORDS] [other options of pytest]

Needs root on Linux. The last line is "N passed, N failed".
"""

from __future__ import annotations

import os
import sys

import pytest
from lab import HERE, ROOT, LabError, refuse_where_impossible


def main() -> int:
    """Run them; returns an exit code."""
    try:
        refuse_where_impossible()
    except LabError as error:
        print(f"cluster lab: {error}", file=sys.stderr)
        print("0 passed, 1 failed")
        return 2
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(ROOT / "tests"))
    sys.path.insert(0, str(ROOT))  # this checkout, also where another is installed
    os.environ["PYTHONPATH"] = str(ROOT)
    options = ["-o", "python_files=check_*.py", "-p", "lab_fixtures", "-v", "--durations=0"]
    chosen = sys.argv[1:]
    files = [] if any(word.startswith(str(HERE)) for word in chosen) else [str(HERE)]
    return int(pytest.main([*options, "--durations-min=1", *files, *chosen]))


if __name__ == "__main__":
    sys.exit(main())
