"""The run folder: its layout, and whether a run starts, goes on or is finished.

The folder is an interface: other programs read it. Invariant: only rank zero writes into it, but
for the log that each rank has of its own, and a folder is made only after every check that can
refuse a run has passed.
"""

from __future__ import annotations

import platform
import socket
from dataclasses import astuple, dataclass, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from disttrain import __version__, schema
from disttrain.config import RunConfig
from disttrain.engine.ending import End
from disttrain.errors import ConfigError, DataError
from disttrain.files import read_json, write_json, write_text

MAY_CHANGE = (
    "name",
    "output_dir",
    "data.batch_size",
    "data.num_workers",
    "data.max_damaged",
    "data.shard_cache_gb",
    "data.cache_text",
    "fleet.",
    "parallel.",
    "train.gradient_accumulation_steps",
    "train.gradient_checkpointing",
    "train.max_steps",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.early_stop",
    "train.sample_",
    "train.trackers",
    "score.",
)
"""Keys that may differ when a run goes on: they change neither its samples nor its weights' shape.
The batch may change because the cursor counts samples. `subjects.N.images` may move too: the
checkpoint holds the digest of what was in it. `subjects.N.held_out` is looked at by scores only."""

PACKAGES = ("torch", "accelerate", "diffusers", "transformers", "safetensors", "pillow", "numpy")


@dataclass(frozen=True)
class RunFolder:
    """Paths inside `runs/NAME/`."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved settings."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions, hardware, world and learning rate of the newest start."""
        return self.path / "environment.json"

    @property
    def progress(self) -> Path:
        """Which subjects are finished, and at how many steps."""
        return self.path / "progress.json"

    @property
    def metrics(self) -> Path:
        """A line per step and subject."""
        return self.path / "metrics.jsonl"

    @property
    def logs(self) -> Path:
        """What each process said."""
        return self.path / "logs"

    def subject(self, name: str) -> Path:
        """Everything of one subject."""
        return self.path / "subjects" / name

    def checkpoints(self, name: str) -> Path:
        """Checkpoint folders of one subject."""
        return self.subject(name) / "checkpoints"

    def finished(self) -> dict[str, End]:
        """How each finished subject ended.

        Raises:
            DataError: progress.json is damaged.
        """
        if not self.progress.is_file():
            return {}
        value = read_json(self.progress)
        try:
            scored = value.get("scored", {})
            ends = {
                name: End(steps, **{"picked": steps, **scored.get(name, {})})
                for name, steps in value["finished"].items()
            }
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self.progress}: not a progress file; use --fresh") from error
        if not all(isinstance(n, int) for end in ends.values() for n in astuple(end)):
            raise DataError(f"{self.progress}: not a progress file; use --fresh")
        return ends

    def mark_finished(self, ends: dict[str, End]) -> None:
        """Record how subjects ended; their results are in place."""
        every = {**self.finished(), **ends}
        scored = {
            name: {"picked": end.picked, "overtrained_for": end.overtrained_for}
            for name, end in every.items()
            if end.overtrained_for or end.picked != end.steps
        }
        steps = {name: end.steps for name, end in every.items()}
        write_json(self.progress, {"finished": steps, **({"scored": scored} if scored else {})})


def fresh_name(config: RunConfig) -> RunConfig:
    """The config under the first name whose folder does not exist: NAME, NAME-2, NAME-3, ..."""
    candidate, number = config, 1
    while candidate.folder.exists():
        number += 1
        candidate = replace(config, name=f"{config.name}-{number}")
    return candidate


def check_same_run(folder: RunFolder, config: RunConfig) -> None:
    """Refuse to go on with settings that would not continue what was begun.

    Raises:
        ConfigError: naming the keys that differ.
    """
    # Built and taken apart again, so that keys which a later version added have their defaults.
    old = schema.to_mapping(schema.build(RunConfig, schema.read_mapping(folder.config)))
    changed = [
        f"{key} ({before} -> {after})"
        for key, (before, after) in schema.differences(old, schema.to_mapping(config)).items()
        if not key.startswith(MAY_CHANGE)
        and not (key.startswith("subjects.") and key.endswith(("images", "held_out")))
    ]
    if changed:
        raise ConfigError(
            f"{folder.path} was begun with other settings: {'; '.join(changed)}; "
            "change them back, give the run another name, or use --fresh"
        )


def write_config(folder: RunFolder, config: RunConfig) -> None:
    """Store the resolved settings; running that file again repeats the run."""
    write_text(folder.config, _as_yaml(config))


def write_subject_config(folder: RunFolder, name: str, config: RunConfig) -> None:
    """Store the settings of one subject of a fleet; running that file trains it alone."""
    write_text(folder.subject(name) / "config.yaml", _as_yaml(config))


def _as_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(schema.to_mapping(config), sort_keys=False, allow_unicode=True)


def describe_environment(world: int, device: torch.device) -> dict[str, Any]:
    """Versions and hardware, for `environment.json` and `disttrain doctor`."""
    gpus = [
        {"name": torch.cuda.get_device_name(i), "memory": torch.cuda.mem_get_info(i)[1]}
        for i in range(torch.cuda.device_count())
    ]
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "disttrain": __version__,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "device": str(device),
        "world_size": world,
    }
