"""What a run says of itself: metrics.jsonl, each subject's loss.csv and loss.svg, trackers.

Invariant: after any number of kills and resumes the files hold each (subject, step) once, because
lines past the checkpoint a run goes on from are cut off first.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from disttrain.engine.curve import loss_curve
from disttrain.files import write_text

CSV_HEADER = ("step", "epoch", "epoch_step", "loss", "learn_rate")


@dataclass(frozen=True)
class StepRecord:
    """One subject's line for one step."""

    step: int
    subject: str
    loss: float
    learning_rate: float
    gradient_norm: float
    epoch: int
    epoch_step: int
    images_per_second: float
    seconds: float


class MetricsLog:
    """Appends records as they come; used on rank zero only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle: io.TextIOWrapper | None = None

    def cut(self, steps: dict[str, int]) -> None:
        """Keep each named subject's records up to its step, then open the log for more."""
        kept = [r for r in self.read() if r.step <= steps.get(r.subject, 0)]
        write_text(self.path, "".join(_line(record) for record in kept))
        self.handle = self.path.open("a", encoding="utf-8")

    def append(self, records: Iterable[StepRecord]) -> None:
        """Add one step's records; each is on disk's side of the process when this returns."""
        assert self.handle is not None, "cut() opens the log"
        for record in records:
            self.handle.write(_line(record))
        self.handle.flush()

    def read(self) -> list[StepRecord]:
        """All whole records; a last line cut by a kill is left out."""
        if not self.path.is_file():
            return []
        records = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(StepRecord(**json.loads(line)))
            except (json.JSONDecodeError, TypeError):
                continue
        return records

    def write_curve(self, subject: str, folder: Path) -> None:
        """Bring a subject's loss.csv (the web UI's columns) and loss.svg up to date."""
        own = [record for record in self.read() if record.subject == subject]
        write_text(folder / "loss.csv", _loss_csv(own))
        points = [(record.step, record.loss) for record in own]
        write_text(folder / "loss.svg", loss_curve(points, f"{subject}: training loss"))

    def close(self) -> None:
        """Close the log."""
        if self.handle is not None:
            self.handle.close()


def _line(record: StepRecord) -> str:
    return json.dumps(asdict(record)) + "\n"


def _loss_csv(records: list[StepRecord]) -> str:
    """`textual_inversion_loss.csv` of the web UI: CRLF, loss with seven places."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(CSV_HEADER)
    for r in records:
        writer.writerow((r.step, r.epoch, r.epoch_step, f"{r.loss:.7f}", r.learning_rate))
    return text.getvalue()


def tracker_values(records: Sequence[StepRecord]) -> dict[str, Any]:
    """One step's records as flat names for TensorBoard or W&B."""
    values: dict[str, Any] = {}
    for record in records:
        values[f"loss/{record.subject}"] = record.loss
        values[f"gradient_norm/{record.subject}"] = record.gradient_norm
    if records:
        values["learning_rate"] = records[0].learning_rate
        values["images_per_second"] = records[0].images_per_second
    return values
