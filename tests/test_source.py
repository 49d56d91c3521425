"""A folder of pictures as a source: what counts, in which order, and what is refused."""

import os
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from pictures import encoded, make_folder, noise, turned

from disttrain.data import folder, images, shard_source
from disttrain.data.shards import write_shards
from disttrain.data.source import (
    FolderSource,
    ShardSource,
    SourceOptions,
    allowance,
    open_source,
)
from disttrain.errors import DataError


def write_picture(path, seed=0, kind="PNG", **options):
    path.write_bytes(encoded(noise(12, 16, seed=seed), kind, **options))


def test_records_hold_what_the_files_do(tmp_path):
    make_folder(tmp_path, 4)
    pictures = open_source(tmp_path)
    assert isinstance(pictures, FolderSource)
    assert pictures.where == str(tmp_path)
    assert [record.key for record in pictures.records] == ["fox-0", "fox-1", "fox-2", "fox-3"]
    data = (tmp_path / "fox-1.png").read_bytes()
    record = pictures.records[1]
    assert record.digest == sha256(data).hexdigest()
    assert (record.width, record.height) == (32, 24)
    assert record.caption == "a fox, Füchse 1"
    assert record.stem == "fox-1"
    assert pictures.records[0].caption is None
    assert pictures.read(1) == data
    assert pictures.read_mask(1) is None
    assert list(pictures.ignored) == []


def test_natural_order_whatever_the_disk_says(tmp_path):
    for name in ["b10", "b9", "B1", "a", "10", "9", "b9a"]:
        write_picture(tmp_path / f"{name}.png")
    keys = [record.key for record in open_source(tmp_path).records]
    assert keys == ["9", "10", "a", "B1", "b9", "b9a", "b10"]


def test_size_is_that_of_the_upright_picture(tmp_path):
    write_picture(tmp_path / "fox.jpg", kind="JPEG", exif=turned(6))
    record = open_source(tmp_path).records[0]
    assert (record.width, record.height) == (12, 16)


def test_what_is_ignored_and_what_is_named(tmp_path):
    write_picture(tmp_path / "fox.PNG")
    write_picture(tmp_path / "sub.png")
    (tmp_path / "nested").mkdir()
    write_picture(tmp_path / "nested" / "deep.png")
    for name in [".hidden.png", "README.md", "others.jsonl", "fox.json", "orphan.txt"]:
        (tmp_path / name).write_text("x")
    for name in ["clip.mp4", "photo.heic", "old.gif"]:
        (tmp_path / name).write_bytes(b"x")
    write_picture(tmp_path / "orphan.mask.png")
    pictures = open_source(tmp_path)
    assert [record.key for record in pictures.records] == ["fox", "sub"]
    expected = ["clip.mp4", "nested", "old.gif", "orphan.mask.png", "photo.heic"]
    assert list(pictures.ignored) == expected


def test_captions(tmp_path):
    for number, text in enumerate([b"  a fox \n", b"\xef\xbb\xbfa fox", b"", "Füchse".encode()]):
        write_picture(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_bytes(text)
    assert [r.caption for r in open_source(tmp_path).records] == ["a fox", "a fox", "", "Füchse"]
    (tmp_path / "2.txt").write_bytes(b"F\xfcchse")
    with pytest.raises(DataError, match=r"2\.txt: not UTF-8"):
        open_source(tmp_path)
    (tmp_path / "2.txt").write_bytes(b"x" * (folder.CAPTION_LIMIT + 1))
    with pytest.raises(DataError, match=r"2\.txt: .*limit"):
        open_source(tmp_path)


def test_masks(tmp_path):
    write_picture(tmp_path / "fox.png")
    mask = encoded(noise(12, 16, 1))
    (tmp_path / "fox.mask.png").write_bytes(mask)
    pictures = open_source(tmp_path)
    assert len(pictures.records) == 1
    assert pictures.read_mask(0) == mask
    (tmp_path / "fox.mask.png").write_bytes(encoded(noise(12, 15, 1)))
    with pytest.raises(DataError, match=r"fox\.png: its mask has 15 x 12 pixels"):
        open_source(tmp_path)
    with pytest.raises(DataError, match=r"fox\.mask\.png: changed"):
        pictures.read_mask(0)


def test_the_digest_notices_every_change(tmp_path):
    make_folder(tmp_path / "a", 4)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first = open_source(tmp_path / "a").digest
    assert open_source(tmp_path / "b").digest == first
    seen = {first}
    (tmp_path / "b" / "fox-1.txt").write_text("another")
    seen.add(open_source(tmp_path / "b").digest)
    (tmp_path / "b" / "fox-1.mask.png").write_bytes(encoded(noise(24, 32, 1)))
    seen.add(open_source(tmp_path / "b").digest)
    (tmp_path / "b" / "fox-0.jpg").rename(tmp_path / "b" / "fox-00.jpg")
    seen.add(open_source(tmp_path / "b").digest)
    (tmp_path / "b" / "fox-1.mask.png").write_bytes(encoded(noise(24, 32, 1, seed=3)))
    seen.add(open_source(tmp_path / "b").digest)
    (tmp_path / "b" / "fox-2.webp").write_bytes(encoded(noise(24, 32, seed=9)))
    seen.add(open_source(tmp_path / "b").digest)
    assert len(seen) == 6


def test_a_picture_that_changes_is_noticed_at_reading(tmp_path):
    make_folder(tmp_path, 2)
    pictures = open_source(tmp_path)
    write_picture(tmp_path / "fox-1.png", seed=7)
    with pytest.raises(DataError, match=r"fox-1\.png: changed"):
        pictures.read(1)
    (tmp_path / "fox-0.jpg").unlink()
    with pytest.raises(DataError, match=r"fox-0\.jpg: No such file"):
        pictures.read(0)


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_a_broken_picture_is_named_at_opening(tmp_path, damage):
    make_folder(tmp_path, 3)
    path = tmp_path / "fox-1.png"
    data = path.read_bytes()
    path.write_bytes({"truncated": data[: len(data) // 2], "text": b"hello", "empty": b""}[damage])
    with pytest.raises(DataError, match=r"fox-1\.png: ") as caught:
        open_source(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_large_folder_is_checked_by_header(tmp_path, monkeypatch):
    make_folder(tmp_path, 3)
    path = tmp_path / "fox-1.png"
    path.write_bytes(path.read_bytes()[:200])
    monkeypatch.setattr(folder, "DECODED_AT_OPENING", 2)
    assert len(open_source(tmp_path).records) == 3
    path.write_bytes(b"hello")
    with pytest.raises(DataError, match=r"fox-1\.png"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("samples", "share", "expected"),
    [
        (0, None, 0),
        (99, None, 0),
        (100, None, 1),
        (299, None, 2),
        (1_000_000, None, 10_000),
        (10, 0.1, 1),
        (19, 0.1, 1),
        (100, 0.29, 29),
        (100, 0.0, 0),
        (7, 1.0, 7),
    ],
)
def test_how_many_may_be_damaged(samples, share, expected):
    assert allowance(samples, share) == expected


def many_pictures(folder: Path, count: int) -> Path:
    folder.mkdir()
    data = [encoded(noise(4, 4, seed=seed)) for seed in range(10)]
    for number in range(count):
        (folder / f"{number}.png").write_bytes(data[number % 10])
    return folder


def test_a_few_damaged_pictures_are_left_out_with_a_line(tmp_path):
    folder = many_pictures(tmp_path / "in", 200)
    whole = open_source(folder)
    assert list(whole.damaged) == []
    (folder / "17.png").write_bytes(b"hello")
    (folder / "18.txt").write_bytes(b"\xff")
    pictures = open_source(folder)
    assert [line.split(": ")[0] for line in pictures.damaged] == [
        str(folder / "17.png"),
        str(folder / "18.txt"),
    ]
    assert [r.key for r in pictures.records] == [str(n) for n in range(200) if n not in (17, 18)]
    assert [pictures.read(n) for n in (16, 17)] == [whole.read(n) for n in (16, 19)]
    assert pictures.digest != whole.digest
    assert list(pictures.sizes) == [198]
    assert pickle.loads(pickle.dumps(pictures)).read(17) == whole.read(19)
    (folder / "100.png").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"3 of 200 pictures .*\(2 may be\).*17\.png.*18\.txt.*100\."
    ):
        open_source(folder)
    assert len(open_source(folder, SourceOptions(max_damaged=0.015)).damaged) == 3


def test_more_damage_than_may_be_is_listed_on_one_line(tmp_path):
    folder = many_pictures(tmp_path / "in", 9)
    for number in range(7):
        (folder / f"{number}.png").write_bytes(b"hello")
    with pytest.raises(
        DataError, match=r"in: 7 of 9 pictures cannot be used \(0 may be\)"
    ) as caught:
        open_source(folder)
    message = str(caught.value)
    assert "4.png: not a JPEG" in message
    assert "5.png" not in message
    assert message.endswith("; and 2 more")
    assert "\n" not in message
    assert len(open_source(folder, SourceOptions(max_damaged=0.8)).records) == 2
    for number in (7, 8):
        (folder / f"{number}.png").unlink()
    with pytest.raises(DataError, match="7 of 7"):
        open_source(folder, SourceOptions(max_damaged=1.0))


def test_sizes_and_shapes(tmp_path):
    folder = make_folder(tmp_path / "in", 7)
    (folder / "fox-3.JPEG").write_bytes(encoded(noise(12, 20), "JPEG", exif=turned(6)))
    (folder / "fox-5.txt").write_text('a fox","height":9,"width":9}')
    pictures = open_source(folder)
    shards = open_source(write_shards(folder, tmp_path / "out", samples_per_shard=3))
    assert list(pictures.sizes) == [7]
    assert list(shards.sizes) == [3, 3, 1]
    for source in (pictures, shards):
        shapes = source.shapes()
        assert shapes.dtype == np.int32
        assert shapes.tolist() == [[r.height, r.width] for r in pictures.records]
    assert shapes[3].tolist() == [20, 12]


def test_missing_empty_and_wrong_places(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such folder"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no pictures"):
        open_source(tmp_path / "empty")
    (tmp_path / "empty" / "scan.tiff").write_bytes(b"x")
    with pytest.raises(DataError, match=r"other files: scan\.tiff"):
        open_source(tmp_path / "empty")
    (tmp_path / "x.tar").write_bytes(b"x")
    with pytest.raises(DataError, match=r"x\.tar: give its index\.json"):
        open_source(tmp_path / "x.tar")
    (tmp_path / "fox.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"fox\.png: not a folder"):
        open_source(tmp_path / "fox.png")


def test_an_index_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "index.json")
    with pytest.raises(DataError, match=r"index\.json: no such index"):
        open_source(tmp_path / "index.json")


def test_two_pictures_of_one_name_are_refused(tmp_path):
    write_picture(tmp_path / "fox.png")
    write_picture(tmp_path / "fox.jpg", kind="JPEG")
    with pytest.raises(DataError, match=r"fox\.jpg and fox\.png share the name 'fox'"):
        open_source(tmp_path)


def test_odd_files_neither_hang_nor_crash(tmp_path):
    write_picture(tmp_path / "fox.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "fox.png")
    pictures = open_source(tmp_path)
    assert [record.key for record in pictures.records] == ["fox", "link"]
    assert list(pictures.ignored) == ["pipe.png"]
    (tmp_path / "lost.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"lost\.png: No such file"):
        open_source(tmp_path)
    (tmp_path / "lost.png").unlink()
    (tmp_path / "piped.png").symlink_to(tmp_path / "pipe.png")
    with pytest.raises(DataError, match=r"piped\.png: not a plain file"):
        open_source(tmp_path)
    (tmp_path / "piped.png").unlink()
    os.close(os.open(os.fsencode(tmp_path) + b"/f\xfcchse.png", os.O_CREAT))
    with pytest.raises(DataError, match="not UTF-8; rename it") as caught:
        open_source(tmp_path)
    str(caught.value).encode()


def test_too_large_a_file_is_refused(tmp_path, monkeypatch):
    write_picture(tmp_path / "fox.png")
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    with pytest.raises(DataError, match=r"fox\.png: \d+ bytes, the limit is 100"):
        open_source(tmp_path)


def test_shards_look_like_their_folder(tmp_path):
    folder = make_folder(tmp_path / "in", 7)
    (folder / "fox-1.mask.png").write_bytes(encoded(noise(24, 32, 1)))
    index = write_shards(folder, tmp_path / "out", samples_per_shard=3)
    pictures = open_source(folder)
    for path in (index, index.parent):
        shards = open_source(path)
        assert isinstance(shards, ShardSource)
        assert list(shards.records) == list(pictures.records)
        assert shards.records[-1] == pictures.records[-1]
        assert shards.records[2:4] == list(pictures.records)[2:4]
        for number in range(7):
            assert shards.read(number) == pictures.read(number)
            assert shards.read_mask(number) == pictures.read_mask(number)
    with pytest.raises(IndexError):
        shards.records[7]


def test_sources_travel_to_other_processes(tmp_path):
    folder = make_folder(tmp_path / "in", 3)
    index = write_shards(folder, tmp_path / "out")
    for path in (folder, index):
        opened = open_source(path)
        opened.read(0)
        copy = pickle.loads(pickle.dumps(opened))
        assert list(copy.records) == list(opened.records)
        assert copy.read(2) == opened.read(2)
        assert copy.digest == opened.digest


def test_many_threads_share_few_open_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_source, "OPEN_SHARDS", 2)
    folder = make_folder(tmp_path / "in", 12)
    shards = open_source(write_shards(folder, tmp_path / "out", samples_per_shard=1))
    expected = [shards.read(number) for number in range(12)]
    start = threading.Barrier(8)

    def work(seed: int) -> bool:
        start.wait()
        picks = np.random.default_rng(seed).integers(0, 12, 300)
        return all(shards.read(int(pick)) == expected[pick] for pick in picks)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert len(shards._handles) <= 2
    descriptors = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    opened = [os.readlink(path) for path in descriptors if os.path.islink(path)]
    assert sum(name.startswith(str(tmp_path)) and name.endswith(".tar") for name in opened) <= 2
