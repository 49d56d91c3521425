"""Captions of a folder's metadata file: what is read, what goes before what, what is refused."""

import json
import os

import pytest
from pictures import encoded, noise

from disttrain.data import metadata
from disttrain.data.metadata import read_captions
from disttrain.data.shards import write_shards
from disttrain.data.source import SourceOptions, open_source
from disttrain.errors import DataError

NAMES = ["a.png", "b.v2.png", "c.png", "d.png"]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed, name in enumerate(NAMES):
        (folder / name).write_bytes(encoded(noise(8, 8, seed=seed)))
    return folder


def json_lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


ROWS = json_lines(
    {"file_name": "b.v2.png", "text": " a fox, red\n", "caption": "no", "score": 3},
    {"file_name": "a.png", "text": None, "prompt": "a cat"},
    {"file_name": "d.png", "text": "Füchse"},
)
TABLE = b'file_name,score,text\nb.v2.png,3,"a fox, red"\na.png,,\n"d.png",1,F\xc3\xbcchse\n'


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(
    ("name", "data", "first"),
    [
        ("metadata.jsonl", ROWS, None),
        ("metadata.jsonl", ROWS.replace(b"\n", b"\r\n\r\n"), None),
        ("metadata.csv", TABLE, ""),
        ("metadata.csv", TABLE.replace(b"\n", b"\r\n"), ""),
    ],
)
def test_captions_of_both_kinds(folder, mark, name, data, first):
    (folder / name).write_bytes(mark + data)
    source = open_source(folder)
    assert [r.key for r in source.records] == ["a", "b.v2", "c", "d"]
    assert [r.caption for r in source.records] == [first, "a fox, red", None, "Füchse"]
    assert list(source.ignored) == []


def test_a_text_file_goes_before_the_table(folder):
    (folder / "metadata.jsonl").write_bytes(ROWS)
    (folder / "d.txt").write_text("its own")
    digest = open_source(folder).digest
    assert [r.caption for r in open_source(folder).records] == [None, "a fox, red", None, "its own"]
    (folder / "metadata.jsonl").write_bytes(ROWS.replace(b"red", b"grey"))
    assert open_source(folder).digest != digest


def test_which_column(folder):
    (folder / "metadata.jsonl").write_bytes(ROWS)
    captions = [
        r.caption for r in open_source(folder, SourceOptions(caption_column="prompt")).records
    ]
    assert captions == ["a cat", None, None, None]
    (folder / "metadata.jsonl").write_bytes(ROWS.replace(b'"text"', b'"other"'))
    assert [r.caption for r in open_source(folder).records] == [None, "no", None, None]


def test_packed_captions_are_members_of_their_own(folder, tmp_path):
    (folder / "metadata.csv").write_bytes(TABLE)
    (folder / "d.txt").write_text(" its own ")
    shards = open_source(write_shards(folder, tmp_path / "out"))
    assert [r.caption for r in shards.records] == ["", "a fox, red", None, "its own"]
    data = (tmp_path / "out" / "shard-000000.tar").read_bytes()
    assert b"b_v2.txt\0" in data
    assert b"a fox, red\0" in data
    before = (tmp_path / "out" / "index.json").read_bytes()
    write_shards(folder, tmp_path / "out")
    assert (tmp_path / "out" / "index.json").read_bytes() == before
    shards = open_source(write_shards(folder, tmp_path / "score", caption_column="score"))
    assert [r.caption for r in shards.records] == ["", "3", None, "its own"]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("metadata.jsonl", ROWS + b"{'x'}\n", r"jsonl line 4: not JSON"),
        ("metadata.jsonl", ROWS + b'\n["a.png"]\n', r"jsonl line 5: not a JSON object"),
        ("metadata.jsonl", ROWS + b"[" * 100_000, r"jsonl line 4: not JSON"),
        (
            "metadata.jsonl",
            ROWS + b'{"file_name": ' + b"9" * 9999 + b"}",
            r"line 4: not JSON|no fi",
        ),
        ("metadata.jsonl", ROWS + b'{"text": "x"}', r"jsonl line 4: no file_name"),
        ("metadata.jsonl", ROWS + b'{"file_name": 3, "text": "x"}', r"jsonl line 4: no file_name"),
        (
            "metadata.jsonl",
            ROWS + b'{"file_name": "c.png", "text": 3}',
            r"line 4: .*not text but '3'",
        ),
        ("metadata.jsonl", ROWS + b'{"file_name": "c.png", "text": "\\ud800"}', r"line 4: .*UTF-8"),
        ("metadata.jsonl", ROWS + ROWS[:80] + b"\n", r"line 4: .*caption on line 1 already"),
        ("metadata.jsonl", json_lines({"file_name": "x.png", "text": ""}), "no picture of this"),
        ("metadata.jsonl", json_lines({"file_name": "s/a.png", "text": ""}), "in a sub-folder"),
        ("metadata.jsonl", json_lines({"file_name": "../a.png", "text": ""}), "leads out of"),
        (
            "metadata.jsonl",
            json_lines({"file_name": "a.png", "label": 1}),
            "'text' or 'caption'; .*'label'",
        ),
        ("metadata.jsonl", json_lines({"file_name": "a.png"}), "there is only file_name"),
        ("metadata.jsonl", b"\xff\xfe" + ROWS, r"jsonl: not UTF-8 text \(byte 0\)"),
        ("metadata.csv", b"", r"csv: empty"),
        ("metadata.csv", TABLE + b"c.png,3,a fox\nx", r"csv line 6: 1 fields where .* has 3"),
        ("metadata.csv", TABLE + b"c.png,a,fox, red\n", r"csv line 5: 4 fields where .* has 3"),
        ("metadata.csv", TABLE + b'c.png,1,"a fox\n', r"csv line 5: not CSV"),
        ("metadata.csv", TABLE + b'c.png,1,"a"fox\n', r"csv line 5: not CSV"),
        ("metadata.csv", b"file_name,text,text\n", r"csv line 1: a column name occurs twice"),
        ("metadata.csv", b"name,text\na.png,x\n", r"csv line 2: no file_name"),
        ("metadata.csv", b"file_name,label\na.png,x\n", "'text' or 'caption'; .*'label'"),
    ],
)
def test_what_is_refused_by_file_and_line(folder, name, data, words):
    (folder / name).write_bytes(data)
    with pytest.raises(DataError, match=words) as caught:
        open_source(folder)
    message = str(caught.value)
    assert message.startswith(str(folder / name))
    assert message.isprintable()


def test_a_column_that_is_not_there(folder):
    (folder / "metadata.csv").write_bytes(TABLE)
    with pytest.raises(DataError, match=r"csv: no column 'words'; .*: 'score', 'text'"):
        open_source(folder, SourceOptions(caption_column="words"))


def test_two_tables_are_refused(folder):
    (folder / "metadata.csv").write_bytes(TABLE)
    (folder / "metadata.jsonl").write_bytes(ROWS)
    with pytest.raises(DataError, match=r"both metadata\.csv and metadata\.jsonl are there"):
        open_source(folder)


def test_limits(folder, monkeypatch):
    (folder / "metadata.csv").write_bytes(TABLE)
    monkeypatch.setattr(metadata, "CAPTION_LIMIT", 9)
    with pytest.raises(DataError, match=r"csv line 2: a caption of 10 bytes, the limit is 9"):
        open_source(folder)
    monkeypatch.setattr(metadata, "FILE_LIMIT", 20)
    with pytest.raises(DataError, match=r"metadata\.csv: \d+ bytes, the limit is 20"):
        open_source(folder)


def test_a_table_that_is_a_pipe_is_not_waited_for(folder, tmp_path):
    os.mkfifo(folder / "pipe")
    (folder / "metadata.csv").symlink_to(folder / "pipe")
    with pytest.raises(DataError, match=r"metadata\.csv: not a plain file"):
        open_source(folder)


def test_a_row_over_several_lines_is_counted_from_its_first(folder):
    table = folder / "metadata.csv"
    table.write_bytes(b'file_name,text\na.png,"one\ntwo"\nx.png,three\n')
    with pytest.raises(DataError, match=r"csv line 4: 'x\.png' is no picture"):
        open_source(folder)
    table.write_bytes(b'file_name,text\n\na.png,"one\ntwo"\n')
    assert read_captions(table, {"a.png"}) == {"a.png": "one\ntwo"}
