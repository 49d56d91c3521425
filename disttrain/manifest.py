"""A list of subjects -> the settings of each alone: what a fleet trains.

Between a table that a person or a program wrote and the fleet. Invariant: every row became a
checked `RunConfig` with one subject, or a refusal that names the row; rows differ from the config
only in what they say.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from pathlib import Path
from typing import Any

import yaml

from disttrain import schema
from disttrain.config import RunConfig, SubjectSettings
from disttrain.config_file import parse_config
from disttrain.errors import ConfigError, DataError
from disttrain.files import read_text

LIMIT = 64 * 2**20
SUBJECT_KEYS = frozenset(field.name for field in dataclasses.fields(SubjectSettings))


def read_manifest(path: Path, tree: dict[str, Any]) -> list[RunConfig]:
    """The settings of every subject of a manifest.

    Args:
        path: a .csv, .jsonl, .yaml or .yml file with a row for each subject, or a folder with a
            subfolder of pictures for each. Columns are the keys of a config's `subjects`, `seed`
            and dotted keys such as `train.max_steps`; an empty cell says nothing.
        tree: a config; its first subject says what rows leave open.

    Raises:
        ConfigError: naming the row.
    """
    usual = dict((tree.get("subjects") or [{}])[0])
    usual.pop("name", None)
    usual.pop("images", None)
    members: list[RunConfig] = []
    names: dict[str, str] = {}
    for where, row in _rows(path):
        try:
            member = _member(tree, usual, row, path)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        name = member.subjects[0].name
        other = names.setdefault(name.lower(), where)
        if other != where:
            raise ConfigError(f"{where}: name {name!r} is that of {other} too; each needs its own")
        members.append(member)
    if not members:
        raise ConfigError(f"{path}: no subjects in it")
    return members


def _member(
    tree: dict[str, Any], usual: dict[str, Any], row: dict[str, Any], path: Path
) -> RunConfig:
    subject, overrides = dict(usual), []
    for key, value in row.items():
        if "." in key or key == "seed":
            text = value if isinstance(value, str) else json.dumps(value)
            overrides.append(f"{key}={text}")
        elif key in SUBJECT_KEYS:
            subject[key] = value
        else:
            known = ", ".join(sorted(SUBJECT_KEYS))
            raise ConfigError(f"{key}: unknown column; use {known}, seed, or section.key")
    for key in ("images", "class_images"):
        subject |= {key: _from(path, subject[key])} if subject.get(key) else {}
    if not subject.get("token") and tree.get("method", {}).get("name") == "textual_inversion":
        subject["token"] = f"<{subject.get('name', '')}>".lower()
    return parse_config(schema.apply_overrides({**tree, "subjects": [subject]}, overrides))


def _from(manifest: Path, place: Any) -> Any:
    """A path as it was given, or beside the manifest if it is only there."""
    beside = manifest.parent / str(place)
    return str(beside) if not os.path.exists(str(place)) and beside.exists() else place


def _rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(where, row) of each subject."""
    if path.is_dir():
        folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
        return [(str(p), {"name": p.name, "images": str(p)}) for p in folders]
    suffix = path.suffix.lower()
    readers = {".csv": _csv, ".jsonl": _jsonl, ".yaml": _yaml, ".yml": _yaml}
    if suffix not in readers:
        raise ConfigError(f"{path}: give a .csv, .jsonl or .yaml file, or a folder of folders")
    try:
        text = read_text(path, LIMIT)
    except DataError as error:
        raise ConfigError(str(error)) from error
    found = []
    for where, row in readers[suffix](text, path):
        if not isinstance(row, dict) or not all(isinstance(key, str) for key in row):
            raise ConfigError(f"{where}: a row is a mapping of columns to values")
        found.append((where, {key: value for key, value in row.items() if value not in ("", None)}))
    return found


def _csv(text: str, path: Path) -> list[tuple[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    found: list[tuple[str, Any]] = []
    try:
        for row in reader:
            where = f"{path} line {reader.line_num}"
            if None in row:
                raise ConfigError(f"{where}: more cells than the first line has columns")
            found.append(
                (where, {key.strip(): (value or "").strip() for key, value in row.items()})
            )
    except csv.Error as error:
        raise ConfigError(f"{path} line {reader.line_num}: not CSV ({error})") from error
    return found


def _jsonl(text: str, path: Path) -> list[tuple[str, Any]]:
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                found.append((f"{path} line {number}", json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path} line {number}: not JSON") from error
    return found


def _yaml(text: str, path: Path) -> list[tuple[str, Any]]:
    try:
        rows = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML") from error
    if not isinstance(rows, list):
        raise ConfigError(f"{path}: a manifest is a list, an entry for each subject")
    return [(f"{path} entry {number}", row) for number, row in enumerate(rows, start=1)]
