"""What a fleet knows of its subjects, on disk: who is where, in one table for people and programs.

Beside `run_folder.py`. Each subject's `status.json` is written by the worker that has it;
`fleet.csv` and `fleet.jsonl` are made from all of them. Invariant: "finished" appears only after
the result is in place.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from disttrain import schema
from disttrain.config import RunConfig
from disttrain.engine.ending import End
from disttrain.engine.run_folder import RunFolder
from disttrain.engine.settings_keys import settings_key
from disttrain.errors import ConfigError, DataError
from disttrain.files import exclusively, read_json, write_json, write_text

FINISHED, FAILED, TRAINING, WAITING = "finished", "failed", "training", "waiting"
STOPPED = "stopped"


@dataclass(frozen=True)
class Status:
    """How far one subject is. `settings` is the digest of what it is trained with. Of a
    finished one `picked` and `overtrained_for` are as in `End`."""

    name: str
    status: str = WAITING
    steps: int = 0
    max_steps: int = 0
    loss: float | None = None
    seconds: float = 0.0
    worker: str = ""
    reason: str = ""
    settings: str = ""
    picked: int = 0
    overtrained_for: int = 0

    @property
    def end(self) -> End:
        """How it ended, if it is finished."""
        return End(self.steps, self.picked or self.steps, self.overtrained_for)


NOT_SHOWN = ("settings", "picked", "overtrained_for")
COLUMNS = tuple(field.name for field in dataclasses.fields(Status) if field.name not in NOT_SHOWN)


class FleetFolder:
    """The files of a fleet in its run folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run = RunFolder(path)
        self.claims = path / "claims"

    def read(self, name: str) -> Status:
        """A subject's status; waiting where nobody has begun it."""
        try:
            value = read_json(self._status_file(name))
            return schema.build(Status, {**value, "name": name})
        except (DataError, ConfigError, TypeError):
            return Status(name)

    def needs_training(self, member: RunConfig, retry: bool) -> bool:
        """Whether a subject is short of its end; one that failed as it is only on `retry`."""
        status = self.read(member.subjects[0].name)
        if status.status == FAILED and status.settings == settings_key(member):
            return retry
        return status.status != FINISHED or not status.end.holds(member.train)

    def write(self, status: Status) -> None:
        """Record a subject's status."""
        if status.loss is not None and not math.isfinite(status.loss):
            status = dataclasses.replace(status, loss=None)  # JSON has no such number
        write_json(self._status_file(status.name), asdict(status))

    def write_table(self, names: Sequence[str]) -> None:
        """Make `fleet.csv` and `fleet.jsonl` anew, in the order of the newest manifest; `names`
        are this worker's, which may have begun with another one."""
        with exclusively(self.path / ".table.lock"):
            rows = [self._row(self.read(name)) for name in self._with_others(names)]
            text = io.StringIO()
            writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            write_text(self.path / "fleet.csv", text.getvalue())
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            write_text(self.path / "fleet.jsonl", lines)

    @staticmethod
    def _row(status: Status) -> dict[str, Any]:
        return {key: value for key, value in asdict(status).items() if key in COLUMNS}

    def remember(self, names: Sequence[str]) -> None:
        """Keep the names of all subjects, in the manifest's order, for tables and `--status`.

        Those of earlier manifests that were begun come after them.
        """
        with exclusively(self.path / ".table.lock"):
            begun = [n for n in self._with_others(names) if self._status_file(n).is_file()]
            every = dict.fromkeys([*names, *begun])
            write_json(self.path / "manifest.json", {"names": list(every)})

    def _with_others(self, names: Sequence[str]) -> list[str]:
        """The names that were remembered, then those of these that were not."""
        try:
            return list(dict.fromkeys([*self.names(), *names]))
        except DataError:
            return list(names)

    def names(self) -> list[str]:
        """The names that were remembered.

        Raises:
            DataError: this is no fleet's run folder.
        """
        value = read_json(self.path / "manifest.json")
        names = value.get("names") if isinstance(value, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{self.path}: not the run folder of a fleet")
        return names

    def _status_file(self, name: str) -> Path:
        return self.run.subject(name) / "status.json"
