"""Defects that random damage and hostile use once found, each by itself."""

from __future__ import annotations

import io
import json
import pickle
import resource
import time
from pathlib import Path

import pytest
from conftest import disttrain
from pictures import encoded, make_folder, noise
from PIL import Image

from disttrain.data import images, tars
from disttrain.data.index import ShardIndex
from disttrain.data.shards import index_tars, verify, write_shards
from disttrain.data.source import SourceOptions, open_source
from disttrain.data.storage import place_of
from disttrain.engine.progress import Progress
from disttrain.errors import DataError
from disttrain.files import sha256_bytes
from disttrain.prompts import PromptPlan


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return write_shards(make_folder(tmp_path / "in", 4), tmp_path / "out", samples_per_shard=2)


def restated(path: Path, old: bytes, new: bytes) -> None:
    """Replace text in an index and make its digests fit."""
    data = path.read_bytes().replace(old, new)
    value = json.loads(data)
    rows = data[data.index(b'"samples":[\n') + 12 : -len(b'\n],"version":1}\n')].split(b",\n")
    for shard in value["shards"]:
        block = b",\n".join(rows[: shard["samples"]])
        rows = rows[shard["samples"] :]
        digest, size = shard["index_sha256"], shard["index_bytes"]
        data = data.replace(digest.encode(), sha256_bytes(block).encode())
        data = data.replace(b'"index_bytes":%d' % size, b'"index_bytes":%d' % len(block))
    path.write_bytes(data)


def test_a_caption_is_not_put_into_itself() -> None:
    caption = "[filewords]" * 5000
    plan = PromptPlan(("{caption} of {token}",), "sks", "fox", "sks fox")
    assert plan.fill(plan.lines[0], caption) == f"{caption} of sks"


def test_a_jpeg_of_thousands_of_scans_is_refused_at_once() -> None:
    data = encoded(Image.new("L", (3000, 3000)), "JPEG", progressive=True)
    last = data.rfind(b"\xff\xda")
    bomb = data[:last] + data[last:-2] * 5000 + b"\xff\xd9"
    started = time.monotonic()
    with pytest.raises(DataError, match=r"x: a JPEG of over 222 scans"):
        images.decode(bomb, "x")
    assert time.monotonic() - started < 1
    many = data[:last] + data[last:-2] * 50 + b"\xff\xd9"
    assert images.decode(many, "x").pixels.shape == (3000, 3000, 3)
    noted = encoded(noise(90, 80), "JPEG", exif=b"Exif\0\0" + b"\xff\xda" * 20_000)
    assert images.decode(noted + b"\xff\xda" * 10**6, "x").pixels.shape == (90, 80, 3)


def test_zeros_over_a_header_are_not_the_end(packed: Path) -> None:
    path = packed.parent / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    second = [n for n in range(0, len(data), 512) if data[n + 257 : n + 262] == b"ustar"][1]
    for size in (512, 1024):
        data[second : second + size] = bytes(size)
        with pytest.raises(DataError, match=f"more after the end mark at byte {second} "):
            list(tars.walk(io.BytesIO(bytes(data)), "x.tar"))


@pytest.mark.parametrize("number", [b"9" * 19, b"9" * 4000])
def test_places_beyond_every_file(packed: Path, number: bytes) -> None:
    index = ShardIndex(packed)
    row = index.row(0)
    for shard in index.shards:
        restated(packed, b'"bytes":%d' % shard.bytes, b'"bytes":' + number)
    restated(packed, b'"offset":%d' % row.offset, b'"offset":' + number[:-1])
    with pytest.raises(DataError, match="impossible values"):
        open_source(packed)
    assert len(verify(packed)) == 1


def test_verifying_reads_no_more_than_a_picture(packed: Path) -> None:
    shard, row = ShardIndex(packed).shards[0], ShardIndex(packed).row(0)
    restated(packed, b'"bytes":%d' % shard.bytes, b'"bytes":%d' % 2**42)
    restated(packed, b'"size":%d' % row.size, b'"size":%d' % 2**41)
    with (packed.parent / shard.file).open("ab") as handle:
        handle.truncate(2**31)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert any("picture damaged" in line for line in verify(packed))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 2**10


def test_half_a_surrogate_pair_is_no_caption_of_an_index(packed: Path) -> None:
    restated(packed, '"a fox, Füchse 1"'.encode(), b'"\\ud800"')
    with pytest.raises(DataError, match="impossible values for 'fox-1'"):
        _ = open_source(packed).records[1]


def test_names_with_controls_are_refused_where_they_come_in(tmp_path: Path) -> None:
    picture = encoded(noise(8, 8))
    members = [("a\nb.png", picture), ("c\x1b[31m.png", picture), ("d.png", picture)]
    data = b"".join(tars.member_header(n, len(p)) + p + tars.padding(len(p)) for n, p in members)
    (tmp_path / "x.tar").write_bytes(data + tars.END)
    report = index_tars([tmp_path / "x.tar"], tmp_path / "index.json")
    assert report.samples == 1
    assert len(report.skipped) == 2
    assert all(line.isprintable() for line in report.skipped)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a\nb.png").write_bytes(picture)
    with pytest.raises(DataError, match=r"the file name 'a\\nb.png' has control"):
        open_source(tmp_path / "folder")
    with pytest.raises(DataError, match="not the URL of a file"):
        place_of("file:///a%00b.tar")


def test_a_json_caption_has_the_limit_of_others(tmp_path: Path) -> None:
    picture, details = encoded(noise(8, 8)), json.dumps({"caption": "x" * 10**6}).encode()
    members = [("a.png", picture), ("a.json", details), ("b.png", picture)]
    data = b"".join(tars.member_header(n, len(p)) + p + tars.padding(len(p)) for n, p in members)
    (tmp_path / "x.tar").write_bytes(data + tars.END)
    report = index_tars([tmp_path / "x.tar"], tmp_path / "index.json")
    assert report.samples == 1
    assert "a: a caption of 1000000 bytes, the limit is 65536" in report.skipped[0]


def test_a_link_to_itself_is_one_damaged_picture(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "in", 3)
    (folder / "loop.png").symlink_to("loop.png")
    source = open_source(folder, SourceOptions(max_damaged=0.3))
    assert len(source.records) == 3
    assert "loop.png" in source.damaged[0]


def test_an_index_written_over_while_open_is_checked_again(packed: Path) -> None:
    source = open_source(packed)
    assert source.records[1].caption == "a fox, Füchse 1"
    data = packed.read_bytes().replace("Füchse 1".encode(), "Füchse 9".encode())
    packed.write_bytes(data)
    with pytest.raises(DataError, match=r"the lines of shard shard-000000.tar were changed"):
        _ = source.records[1]


def test_another_process_never_opens_another_index(packed: Path) -> None:
    pickled = pickle.dumps(open_source(packed))
    assert pickle.loads(pickled).read(0) == open_source(packed).read(0)
    index_tars([packed.parent / "shard-000001.tar"], packed)
    with pytest.raises(DataError, match=r"index\.json: changed since the run began"):
        pickle.loads(pickled).read(0)
    packed.unlink()
    with pytest.raises(DataError, match=r"index\.json: no such index"):
        pickle.loads(pickled).read_mask(0)


def test_packing_leaves_other_programs_files_alone(packed: Path, tmp_path: Path) -> None:
    other = packed.parent / "notes" / ".draft.tmp"
    other.parent.mkdir()
    other.write_text("precious")
    own = packed.parent / ".shard-000001.tar.abcdef.tmp"
    own.write_text("left by a killed run")
    write_shards(tmp_path / "in", packed.parent, samples_per_shard=2)
    assert other.read_text() == "precious"
    assert not own.exists()


def test_places_that_cannot_be_written_are_said_in_one_line(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        result = disttrain("shard", tmp_path / "in", tmp_path / place)
        assert result.returncode == 2
        assert f"{place}: cannot be written" in result.stderr.splitlines()[-1]
        assert "Traceback" not in result.stderr
    with pytest.raises(DataError, match=r"file/index\.json: cannot be written"):
        index_tars([packed.parent / "shard-000000.tar"], tmp_path / "file" / "index.json")


def test_a_folder_named_like_markup_does_not_end_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    progress = Progress(shown=True)
    assert progress.live
    with progress.counter("latents of [bold] [/red]") as count:
        count(1, 2)
        assert progress.bar is not None
        assert "[/red]" in "".join(
            str(cell) for cell in progress.bar.make_tasks_table(progress.bar.tasks).columns[0].cells
        )
