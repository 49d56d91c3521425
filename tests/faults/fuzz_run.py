"""Runs fuzz cases in this process: `python tests/faults/fuzz_run.py --seed 11 --count 1000 FOLDER`.

Prints one JSON object: failures (each with its case number), how often reading worked and was
refused, the longest case, and how far memory grew. A case is given by seed and number alone:
`--first N --count 1` runs case N again.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import gc
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fuzz_checks import Case, Material
from fuzz_kinds import KINDS
from fuzz_twins import TWINS

MOST_SECONDS = 2.0
MOST_GROWTH = 200 * 2**20
ALARM_SECONDS = 5.0


class TooSlow(BaseException):
    """Not an Exception, so that nothing which swallows those swallows it."""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--twins", action="store_true", help="run the planted twins instead")
    options = parser.parse_args()
    os.environ["HOME"] = str(options.folder / "home")
    os.environ["TMPDIR"] = str(options.folder / "tmp")
    for name in ("home", "tmp", "work", "cases"):
        (options.folder / name).mkdir(parents=True)
    os.chdir(options.folder / "work")
    fuzz = Fuzz(options.folder, options.seed)
    numbers = range(options.first, options.first + options.count)
    if not options.twins:
        print(json.dumps(fuzz.run(numbers)))
        return 0
    results = {}
    for twin, sign in TWINS.items():
        with ExitStack() as stack:
            twin(stack)
            results[twin.__name__] = fuzz.run(numbers, sign)["failures"]
    print(json.dumps(results))
    return 0


class Fuzz:
    """All cases of one seed."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.material = Material.make(folder / "material")
        for kind in range(len(KINDS)):  # so that what is loaded once is no growth
            self._case(-1 - kind, kind)
        self.counts: Counter[str] = Counter()

    def run(self, numbers: range, until: str = "") -> dict[str, Any]:
        """Every case of `numbers`, and what came of it; only up to a failure that says `until`."""
        failures: list[str] = []
        slowest, most, begun = 0.0, 0, memory()
        peak = 0
        for number in numbers:
            print(f"case {number}", file=sys.stderr, flush=True)  # the last one if it crashes
            before, watched = memory(), self._watched()
            reset_peak()
            case, seconds = self._case(number)
            if seconds > MOST_SECONDS:  # another program may have had the processor
                seconds = min(seconds, self._case(number)[1])
            grown = peak_memory() - before
            if seconds > MOST_SECONDS:
                case.fail(f"hang: {seconds:.1f} s")
            if grown > MOST_GROWTH:
                case.fail(f"memory: {grown >> 20} MiB more within the case")
            if self._watched() != watched:
                case.fail("writes outside of the folder of the case")
            failures += [f"seed {self.seed} case {number}: {why}" for why in case.failures]
            self.counts.update(case.counts)
            slowest, peak = max(slowest, seconds), max(peak, grown)
            most = max(most, memory() - begun)
            if until and any(until in why for why in case.failures):
                break
        if most > MOST_GROWTH:
            failures.append(f"seed {self.seed}: memory: {most >> 20} MiB more over all cases")
        return {
            "failures": failures,
            "counts": dict(self.counts),
            "slowest seconds": round(slowest, 3),
            "growth MiB": most >> 20,
            "growth within a case MiB": peak >> 20,
        }

    def _case(self, number: int, kind: int | None = None) -> tuple[Case, float]:
        folder = self.folder / "cases" / f"case-{number}"
        draw = random.Random(f"{self.seed} {number}")
        case = Case(folder, draw, self.material)
        case.inputs.mkdir(parents=True)
        check = KINDS[number % len(KINDS) if kind is None else kind]
        started = time.monotonic()
        try:
            _within(ALARM_SECONDS, lambda: check(case))
        except TooSlow:
            case.fail(f"hang in {check.__name__}")
        except Exception as error:
            case.fail(f"traceback {check.__name__}: {type(error).__name__}: {error!s:.300}")
        seconds = time.monotonic() - started
        case.compare_inputs()
        shutil.rmtree(folder)
        return case, seconds

    def _watched(self) -> list[tuple[str, int, int]]:
        """What lies where nothing may be written: home, temporary and working folder, material."""
        rows = []
        for name in (".", "home", "tmp", "work", "cases", "material"):
            for path in sorted((self.folder / name).glob("**/*" if name != "." else "*")):
                status = path.lstat()
                rows.append((str(path), status.st_size, status.st_mtime_ns * path.is_file()))
        return rows


def _within(seconds: float, work: Callable[[], None]) -> None:
    def ring(number: int, frame: object) -> None:
        raise TooSlow

    faulthandler.dump_traceback_later(30, exit=True)  # code that never comes back to the handler
    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        work()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()


def memory() -> int:
    """Resident bytes now, without what the allocator keeps for later."""
    gc.collect(0)
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def reset_peak() -> None:
    """Begin counting the peak anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Most resident bytes since `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError


if __name__ == "__main__":
    sys.exit(main())
