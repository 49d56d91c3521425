"""The settings of a run, as files that a job can run later and that nobody edits meanwhile.

Between the config a person keeps working on and `slurm_job.py`. Invariant: a snapshot that is run
from the same directory is the same run: every setting is in it, and pictures stay where they were.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from disttrain import schema
from disttrain.cluster.commands import Options, all_overrides
from disttrain.config import RunConfig
from disttrain.config_file import load_config
from disttrain.manifest import read_manifest

CONFIG = "config.yaml"
MANIFEST = "manifest.jsonl"


@dataclass(frozen=True)
class Snapshot:
    """Files of a run, by name, and which of them are the words of its command."""

    run: Path
    """The run folder."""
    files: dict[str, str]
    """Texts by file name."""
    words: tuple[str, ...]
    """File names in the order in which the command wants them."""


def take_snapshot(options: Options) -> Snapshot:
    """Read config and manifest as the run will; raises what it would raise."""
    overrides = all_overrides(options)
    if options.fleet is None:
        config = load_config(options.config, overrides)
        return Snapshot(config.folder, {CONFIG: _yaml(schema.to_mapping(config))}, (CONFIG,))
    tree = schema.apply_overrides(schema.read_mapping(options.config), overrides)
    members = read_manifest(options.fleet, tree)
    files = {CONFIG: _yaml(tree), MANIFEST: manifest_rows(members, tree)}
    return Snapshot(members[0].folder, files, (MANIFEST, CONFIG))


def manifest_rows(members: Sequence[RunConfig], tree: dict[str, Any]) -> str:
    """A manifest that gives the same members from the same tree, wherever it lies.

    The one it stands for may find pictures beside itself, or be a folder.
    """
    return "".join(json.dumps(_row(member, tree), ensure_ascii=False) + "\n" for member in members)


def _row(member: RunConfig, tree: dict[str, Any]) -> dict[str, Any]:
    own = schema.to_mapping(member)
    subject = own["subjects"][0]
    usual = schema.to_mapping(schema.build(RunConfig, {**tree, "subjects": [subject]}))
    row = {key: value for key, value in subject.items() if value != ""}
    present = schema.flatten(own)
    for key, (_, value) in schema.differences(usual, own).items():
        if value is not None or key in present:
            row[key] = json.dumps(value)  # a cell is read as an override is
    return row


def _yaml(tree: Any) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
