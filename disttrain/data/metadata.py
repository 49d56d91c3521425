"""Captions from a folder's metadata.jsonl or metadata.csv, as Hugging Face's ImageFolder has them.

Beside `folder.py`. Each row names a picture of the folder under `file_name` and has its caption in
another column. Invariant: every row is used or refused by file and line; nothing is guessed.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from disttrain.data.plain_files import decode_text, read_bounded
from disttrain.errors import DataError

NAMES = ("metadata.jsonl", "metadata.csv")
FILE_COLUMN = "file_name"
CAPTION_COLUMNS = ("text", "caption")
FILE_LIMIT = 2**28
CAPTION_LIMIT = 2**16


def read_captions(path: Path, pictures: Container[str], column: str = "") -> dict[str, str]:
    """Captions by the file name of their picture, without surrounding white space.

    A picture without a row, or with a null caption, is not in the result.

    Args:
        pictures: file names of the folder's pictures.
        column: which column holds captions; empty: the first of `CAPTION_COLUMNS` that is there.

    Raises:
        DataError: a broken line, an unknown column, a name that is not in `pictures`, or twice.
    """
    text = decode_text(read_bounded(path, FILE_LIMIT), str(path))
    rows = _json_rows if path.suffix == ".jsonl" else _csv_rows
    wanted = (column,) if column else CAPTION_COLUMNS
    columns: dict[str, None] = {}
    found: dict[str, tuple[int, dict[str, Any]]] = {}
    for line, row in rows(text, path):
        name = row.get(FILE_COLUMN)
        if not isinstance(name, str) or not name:
            raise DataError(f"{path} line {line}: no {FILE_COLUMN}; name the picture's file there")
        _refuse_strange(name, pictures, f"{path} line {line}")
        if name in found:
            raise DataError(
                f"{path} line {line}: {name!r} has a caption on line {found[name][0]} already"
            )
        columns |= dict.fromkeys(row)
        found[name] = line, {key: row[key] for key in wanted if key in row}
    chosen = next((name for name in wanted if name in columns), None)
    if chosen is None and found:
        others = ", ".join(repr(name[:40]) for name in list(columns)[:8] if name != FILE_COLUMN)
        raise DataError(
            f"{path}: no column {' or '.join(map(repr, wanted))}; name the one that holds the "
            f"captions: {others or f'there is only {FILE_COLUMN}'}"
        )
    captions = {
        name: _caption(row.get(chosen or ""), f"{path} line {line}")
        for name, (line, row) in found.items()
    }
    return {name: text for name, text in captions.items() if text is not None}


def _caption(value: Any, where: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise DataError(f"{where}: the caption is not text but {str(value)[:40]!r}")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise DataError(f"{where}: the caption is not text that UTF-8 can hold") from error
    if size > CAPTION_LIMIT:
        raise DataError(f"{where}: a caption of {size} bytes, the limit is {CAPTION_LIMIT}")
    return value.strip()


def _refuse_strange(name: str, pictures: Container[str], where: str) -> None:
    if name in pictures:
        return
    if ".." in name.replace("\\", "/").split("/"):
        raise DataError(f"{where}: {name[:80]!r} leads out of the folder, which is refused")
    if "/" in name:
        raise DataError(
            f"{where}: {name[:80]!r} lies in a sub-folder; only pictures directly in the folder "
            "are read, move it there"
        )
    raise DataError(f"{where}: {name[:80]!r} is no picture of this folder; correct or remove it")


def _json_rows(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of JSON lines; empty lines are passed over."""
    for number, line in enumerate(io.StringIO(text, newline="\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} line {number}: not JSON ({error.msg})") from error
        except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
            raise DataError(f"{path} line {number}: not JSON that can be read") from error
        if not isinstance(row, dict):
            raise DataError(f"{path} line {number}: not a JSON object with {FILE_COLUMN!r}")
        yield number, row


def _csv_rows(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of comma-separated lines under a header; a row may span lines."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    while True:
        begun = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path} line {begun}: not CSV ({error})") from error
        if fields is None:
            break
        if not fields:
            continue
        if not header:
            header = fields
            if len(set(header)) != len(header):
                raise DataError(f"{path} line {begun}: a column name occurs twice; rename one")
            continue
        if len(fields) != len(header):
            raise DataError(
                f"{path} line {begun}: {len(fields)} fields where the header has {len(header)}; "
                "put text with commas between quotes"
            )
        yield begun, dict(zip(header, fields, strict=True))
    if not header:
        raise DataError(f"{path}: empty; its first line names the columns, {FILE_COLUMN!r} first")
