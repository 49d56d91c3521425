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
LONGEST_MESSAGE = 600
SUBJECT_KEYS = frozenset(field.name for field in dataclasses.fields(SubjectSettings))


def read_manifest(path: Path, tree: dict[str, Any]) -> list[RunConfig]:
    """The settings of every subject of a manifest.

    Args:
        path: a .csv, .jsonl, .yaml or .yml file with a row for each subject, or a folder with a
            subfolder of pictures for each. Columns are the keys of a config's `subjects`, `seed`
            and dotted keys such as `train.max_steps`; an empty cell says nothing.
        tree: a config; its first subject says what rows leave open, but for name, pictures and the
            new token of textual inversion, which is `<name>` where a row gives none.

    Raises:
        ConfigError: naming the row.
    """
    usual = _usual(tree)
    members: list[RunConfig] = []
    names: dict[str, str] = {}
    for where, row in _rows(path):
        try:
            member = _member(tree, usual, row, path)
        except ConfigError as error:
            raise ConfigError(f"{where}: {_in_a_line(str(error))}") from error
        name = member.subjects[0].name
        if name.lower() in names:
            other = names[name.lower()]
            raise ConfigError(f"{where}: name {name!r} is that of {other} too; each needs its own")
        names[name.lower()] = where
        members.append(member)
    if not members:
        raise ConfigError(f"{path}: no subjects in it")
    return members


def _usual(tree: dict[str, Any]) -> dict[str, Any]:
    """What a config says of its subjects, without what each must have for itself.

    Held-out pictures are of one subject: those of a config would judge all rows by another one.
    """
    subjects = tree.get("subjects") or [{}]
    if not isinstance(subjects, list) or not isinstance(subjects[0], dict):
        raise ConfigError("subjects: expected a list of subjects")
    own = ("name", "images", "held_out")
    return {key: value for key, value in subjects[0].items() if key not in own}


def _in_a_line(message: str) -> str:
    """A message that may quote whatever stood in a cell."""
    line = " ".join(message.removeprefix("subjects.0.").split())
    half = LONGEST_MESSAGE // 2
    return line if len(line) <= LONGEST_MESSAGE else f"{line[:half]} ... {line[-half:]}"


def _member(
    tree: dict[str, Any], usual: dict[str, Any], row: dict[str, Any], path: Path
) -> RunConfig:
    subject, overrides = dict(usual), []
    for key, value in row.items():
        section, dot, _ = key.partition(".")
        if key == "seed" or (dot and section != "subjects"):
            overrides.append(f"{key}={_text(key, value)}")
        elif key in SUBJECT_KEYS:
            subject[key] = value
        else:
            known = ", ".join(sorted(SUBJECT_KEYS))
            raise ConfigError(f"{key!r}: unknown column; use {known}, seed, or section.key")
    for key in ("images", "class_images", "held_out"):
        if isinstance(subject.get(key), str):
            subject[key] = _from(path, subject[key])
    filled = schema.apply_overrides({**tree, "subjects": [subject]}, overrides)
    method = filled.get("method")
    new_word = isinstance(method, dict) and method.get("name") == "textual_inversion"
    if new_word and "token" not in row:
        filled["subjects"][0]["token"] = f"<{subject.get('name', '')}>".lower()
    return parse_config(filled)


def _text(key: str, value: Any) -> str:
    """A cell as it would stand in an override."""
    if isinstance(value, str):
        return value
    plain = (str, int, float, bool)
    if not isinstance(value, plain) and not (
        isinstance(value, list) and all(isinstance(item, plain) for item in value)
    ):
        raise ConfigError(f"{key}: expected a number, text or a list, found {type(value).__name__}")
    return json.dumps(value)


def _from(manifest: Path, place: str) -> str:
    """A path as it was given, or beside the manifest if it is only there."""
    beside = str(manifest.parent / place)
    return beside if not os.path.exists(place) and os.path.exists(beside) else place


def _rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(where, row) of each subject."""
    suffix = path.suffix.lower()
    readers = {".csv": _csv, ".jsonl": _jsonl, ".yaml": _yaml, ".yml": _yaml}
    if path.is_dir():
        return _folders(path)
    if suffix not in readers:
        raise ConfigError(f"{path}: give a .csv, .jsonl or .yaml file, or a folder of folders")
    try:
        text = read_text(path, LIMIT)
    except DataError as error:
        raise ConfigError(str(error)) from error
    found = []
    for line, row in readers[suffix](text, path):
        where = f"{path} line {line}"
        if not isinstance(row, dict) or not all(isinstance(key, str) for key in row):
            raise ConfigError(f"{where}: a row is a mapping of columns to values")
        found.append((where, {key: value for key, value in row.items() if value not in ("", None)}))
    return found


def _folders(path: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    return [(str(p), {"name": p.name, "images": str(p)}) for p in folders]


def _csv(text: str, path: Path) -> list[tuple[int, Any]]:
    """(line, row) of each row with something in it; spreadsheets leave empty rows and cells."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    found: list[tuple[int, Any]] = []
    columns: list[str] = []
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            where = f"{path} line {reader.line_num}"
            if not columns:
                columns = cells
                twice = {name for name in columns if name and columns.count(name) > 1}
                if twice:
                    raise ConfigError(f"{where}: column {min(twice)!r} is given twice")
                continue
            if any(cells[len(columns) :]):
                raise ConfigError(f"{where}: more cells than the first line has columns")
            # A value under an empty heading is kept, to be refused.
            found.append(
                (reader.line_num, {k: v for k, v in zip(columns, cells, strict=False) if v})
            )
    except csv.Error as error:
        raise ConfigError(f"{path} line {reader.line_num}: not CSV ({error})") from error
    return found


def _jsonl(text: str, path: Path) -> list[tuple[int, Any]]:
    """(line, value) of each; only line feeds end lines, other separators may stand in texts."""
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                found.append((number, json.loads(line, object_pairs_hook=_each_once)))
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path} line {number}: not JSON ({error})") from error
    return found


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key '{twice}' is given twice")
    return found


def _yaml(text: str, path: Path) -> list[tuple[int, Any]]:
    """(line, value) of each entry of a list."""
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            twice = _repeated(node)  # before shared parts are merged in, which rows may override
            rows = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError, KeyError, AttributeError) as error:
        # The last two are PyYAML's for `!!bool x` and `!!timestamp x`.
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "nested too deeply or not valid"
        raise ConfigError(f"{path}{line}: not YAML ({problem})") from error
    if not isinstance(node, yaml.SequenceNode) or not isinstance(rows, list):
        raise ConfigError(f"{path}: a manifest is a list, an entry for each subject")
    if twice:
        line, key = twice[0]
        raise ConfigError(f"{path} line {line}: key {key!r} is given twice")
    lines = [entry.start_mark.line + 1 for entry in node.value]
    return list(zip(lines, rows, strict=True))


def _repeated(node: yaml.Node | None) -> list[tuple[int, Any]]:
    """(line, key) of keys that an entry gives twice, one of which would be ignored in silence."""
    found = []
    for entry in node.value if isinstance(node, yaml.SequenceNode) else []:
        pairs = entry.value if isinstance(entry, yaml.MappingNode) else []
        keys = [key.value for key, _ in pairs]
        line = entry.start_mark.line + 1
        found += [(line, key) for i, key in enumerate(keys) if key in keys[:i]]
    return found
