"""Fixtures of the checks, and their closing line. A plugin that run_checks.py loads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import train_here
from lab import ROOT, Lab
from trees import config_file

STARTED = time.monotonic()


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Three hosts for all checks; one that a check switched off is on again for the next."""
    with Lab(nodes=3) as started:
        yield started


@pytest.fixture
def whole_lab(lab: Lab) -> Iterator[Lab]:
    """The lab with every host idle, at the start of a check; nothing goes on after it."""
    lab.mend_all()
    yield lab
    lab.run("scancel", "--user=root", "--full")
    lab.mend_all()


@pytest.fixture(scope="session")
def reference(lab: Lab) -> Callable[..., Path]:
    """One process in peace: method and steps -> run folder; each is trained once."""
    made: dict[tuple[str, int], Path] = {}

    def run(method: str, steps: int = 6) -> Path:
        if (method, steps) not in made:
            import yaml

            folder = lab.share / f"reference-{steps}"
            file = config_file(method, folder, max_steps=steps)
            made[method, steps] = train_here(yaml.safe_load(file.read_text()))
        return made[method, steps]

    return run


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """The last line: N passed, N failed."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:
        return
    counts = {name: len(reporter.stats.get(name, [])) for name in ("passed", "failed", "error")}
    skipped = len(reporter.stats.get("skipped", []))
    note = f" ({skipped} not enabled)" if skipped else ""
    print(f"total {time.monotonic() - STARTED:.0f} s from {ROOT}{note}")
    print(f"{counts['passed']} passed, {counts['failed'] + counts['error']} failed")
