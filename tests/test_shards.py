"""Shards: written deterministically, read by webdataset, continued, indexed, verified, attacked."""

import io
import json
import os
import random
import shutil
import sys
import tarfile
import threading
import time
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import webdataset
from pictures import encoded, make_folder, noise

from disttrain import cli, files
from disttrain.data import images, storage, tar_samples
from disttrain.data.index import SampleRow, ShardEntry, ShardIndex, write_index
from disttrain.data.shards import expand_patterns, index_tars, verify, write_shards
from disttrain.data.source import ShardSource, open_source
from disttrain.data.tars import split_name, walk
from disttrain.errors import DataError, UserError


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder that is not hidden."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}


def read_by_webdataset(*paths: Path) -> list[dict]:
    return list(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False))


def tar_of(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = make_folder(tmp_path_factory.mktemp("pictures") / "foxes", 11)
    (folder / "fox-1.json").write_text('{"score": 3}')
    (folder / "fox-3.mask.png").write_bytes(encoded(noise(24, 32, 1)))
    (folder / ("long " * 30 + "name.png")).write_bytes(encoded(noise(8, 8)))
    (folder / "狐.v2.png").write_bytes(encoded(noise(8, 8, seed=1)))
    (folder / "狐.v2.txt").write_text("a fox")
    return folder


def test_webdataset_reads_our_shards_identically(folder, tmp_path):
    index = write_shards(folder, tmp_path / "out", samples_per_shard=4)
    tars = sorted((tmp_path / "out").glob("*.tar"))
    assert [path.name for path in tars] == [f"shard-{number:06d}.tar" for number in range(4)]
    samples = read_by_webdataset(*tars)
    source = open_source(index)
    assert [s["__key__"] for s in samples] == [record.key for record in source.records]
    listed = {
        path.stem.replace(".", "_"): path for path in folder.iterdir() if "mask" not in path.name
    }
    assert len(samples) == 13
    for number, sample in enumerate(samples):
        (kind,) = {"jpg", "png", "webp"} & set(sample)
        assert sample[kind] == source.read(number)
        key = sample["__key__"]
        stem = "狐.v2" if key == "狐_v2" else key
        pictures = [
            path
            for path in folder.glob(f"{stem}.*")
            if path.suffix.lower()[1:] in (kind, {"jpg": "jpeg"}.get(kind, kind))
            and "mask" not in path.name
        ]
        assert [sample[kind]] == [path.read_bytes() for path in pictures]
        caption = folder / f"{stem}.txt"
        assert sample.get("txt") == (caption.read_bytes() if caption.exists() else None)
        assert key in listed
    by_key = {sample["__key__"]: sample for sample in samples}
    assert by_key["fox-1"]["json"] == b'{"score": 3}'
    assert by_key["fox-3"]["mask.png"] == (folder / "fox-3.mask.png").read_bytes()


def test_gnu_tar_semantics_are_plain_and_anonymous(folder, tmp_path):
    write_shards(folder, tmp_path)
    with tarfile.open(tmp_path / "shard-000000.tar", "r:") as archive:
        members = archive.getmembers()
    assert len(members) == 13 + 6 + 1 + 1
    names = [member.name for member in members if member.name.startswith(("fox-1.", "fox-3."))]
    assert " ".join(names) == ("fox-1.json fox-1.png fox-1.txt fox-3.jpg fox-3.mask.png fox-3.txt")
    for member in members:
        owner = (member.mtime, member.uid, member.gid, member.uname, member.gname, member.mode)
        assert owner == (0, 0, 0, "", "", 0o644)


def test_writing_is_deterministic(folder, tmp_path):
    write_shards(folder, tmp_path / "a", samples_per_shard=3, workers=1)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in sorted(folder.iterdir(), reverse=True):
        shutil.copy(path, copy)
    write_shards(copy, tmp_path / "b", samples_per_shard=3, workers=4)
    first = contents(tmp_path / "a")
    assert len(first) == 6
    assert contents(tmp_path / "b") == first


def test_index_tells_the_truth(folder, tmp_path):
    path = write_shards(folder, tmp_path, samples_per_shard=4)
    value = json.loads(path.read_text("utf-8"))
    assert value["version"] == 1
    rows = iter(value["samples"])
    for shard in value["shards"]:
        data = (tmp_path / shard["file"]).read_bytes()
        assert shard["bytes"] == len(data)
        assert shard["sha256"] == sha256(data).hexdigest()
        with tarfile.open(tmp_path / shard["file"], "r:") as archive:
            by_name = {member.name: member for member in archive.getmembers()}
        for _ in range(shard["samples"]):
            row = next(rows)
            picture = data[row["offset"] : row["offset"] + row["size"]]
            assert row["sha256"] == sha256(picture).hexdigest()
            places = {
                (m.offset_data, m.size)
                for n, m in by_name.items()
                if split_name(n)[0] == row["key"]
            }
            assert (row["offset"], row["size"]) in places
            assert (row["width"], row["height"]) in {(32, 24), (8, 8)}
    assert next(rows, None) is None
    captions = [row["caption"] for row in value["samples"] if row["key"] == "fox-1"]
    assert captions == ["a fox, Füchse 1"]


def test_limits_of_shards(folder, tmp_path):
    index = ShardIndex(write_shards(folder, tmp_path / "a", samples_per_shard=5))
    assert [shard.samples for shard in index.shards] == [5, 5, 3]
    index = ShardIndex(write_shards(folder, tmp_path / "b", bytes_per_shard=9000))
    assert len(index.shards) > 2
    assert all(shard.bytes <= 9000 for shard in index.shards)
    neighbours = zip(index.shards, index.shards[1:], strict=False)
    assert all(first.bytes + second.bytes > 9000 for first, second in neighbours)
    index = ShardIndex(write_shards(folder, tmp_path / "c", bytes_per_shard=1))
    assert [shard.samples for shard in index.shards] == [1] * 13


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("9000", 9000),
        ("9KB", 9000),
        ("8.5kib", 8704),
        ("2 M", 2 * 10**6),
        ("1GiB", 2**30),
        ("7B", 7),
    ],
)
def test_sizes_on_the_command_line(text, size):
    assert cli._size(text, "--max-size") == size


@pytest.mark.parametrize("text", ["", "MB", "-1", "1e9", "1iB", "9 PB", "0x9", "nan", "1.MB"])
def test_what_is_no_size(text):
    with pytest.raises(UserError, match=r"--max-size: .*is no size"):
        cli._size(text, "--max-size")


def test_the_command(folder, tmp_path, capsys):
    write_shards(folder, tmp_path / "a", bytes_per_shard=9000, samples_per_shard=3)
    words = ["--max-size", "9KB", "--samples-per-shard", "3", "--workers", "1"]
    assert cli.main(["shard", str(folder), str(tmp_path / "b"), *words]) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    index = tmp_path / "c" / "other.json"
    tars = str(tmp_path / "b" / "shard-*.tar")
    assert cli.main(["shard", "--index", tars, "--output", str(index), "--workers", "2"]) == 0
    assert list(open_source(index).records) == list(open_source(tmp_path / "a").records)
    assert cli.main(["shard", "--verify", str(index)]) == 0
    assert capsys.readouterr().out.endswith("all shards are whole\n")
    (tmp_path / "b" / "shard-000001.tar").unlink()
    assert cli.main(["shard", "--verify", str(index), "--workers", "1"]) == 2
    assert "shard-000001.tar: missing\n1 damaged\n" in capsys.readouterr().out


def test_caption_keys_on_the_command_line(tmp_path):
    pictures = make_folder(tmp_path / "in", 1)
    (pictures / "metadata.jsonl").write_text('{"file_name": "fox-0.jpg", "prompt": "a fox"}')
    (pictures / "fox-0.json").write_text('{"caption": "b", "prompt": "c"}')
    out = tmp_path / "out"
    assert cli.main(["shard", str(pictures), str(out), "--caption-key", "prompt"]) == 0
    assert open_source(out).records[0].caption == "a fox"
    tar_of(tmp_path / "x.tar", [("a.png", encoded(noise(8, 8))), ("a.json", b'{"prompt": "c"}')])
    assert cli.main(["shard", "--index", str(tmp_path / "x.tar"), "--caption-key", "prompt"]) == 0
    assert open_source(tmp_path / "index.json").records[0].caption == "c"


class Stop(Exception):
    pass


def stop_at(count: int):
    def progress(done: int, total: int) -> None:
        assert total == 13
        if done == count:
            raise Stop

    return progress


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("count", [1, 5, 13])
def test_an_interrupted_run_continues(folder, tmp_path, monkeypatch, workers, count):
    write_shards(folder, tmp_path / "whole", samples_per_shard=2)
    target = tmp_path / "out"
    with pytest.raises(Stop):
        write_shards(folder, target, samples_per_shard=2, workers=workers, progress=stop_at(count))
    left = contents(target)
    assert "index.json" not in left
    whole = contents(tmp_path / "whole")
    assert left.items() <= whole.items(), "only complete shards may have their name"
    assert list(target.glob(".*.tmp")) == []
    written = []
    atomic_writer = files.atomic_writer
    monkeypatch.setattr(
        files, "atomic_writer", lambda path: written.append(path.name) or atomic_writer(path)
    )
    (target / ".shard-000099.tar.x.tmp").write_bytes(b"what a killed run left")
    write_shards(folder, target, samples_per_shard=2)
    assert contents(target) == whole
    assert set(written).isdisjoint(left), "finished shards are kept, not written again"
    assert list(target.glob(".*.tmp")) == []


def test_a_killed_process_leaves_no_half_shard(folder, tmp_path):
    target = tmp_path / "out"
    child = os.fork()
    if child == 0:

        def die(done: int, total: int) -> None:
            if done == 7:
                os.kill(os.getpid(), 9)

        write_shards(folder, target, samples_per_shard=2, workers=2, progress=die)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    write_shards(folder, tmp_path / "whole", samples_per_shard=2)
    assert contents(target).items() <= contents(tmp_path / "whole").items()
    write_shards(folder, target, samples_per_shard=2)
    assert contents(target) == contents(tmp_path / "whole")
    assert list(target.glob(".*.tmp")) == []


def test_other_shards_are_never_overwritten(folder, tmp_path):
    write_shards(folder, tmp_path / "out", samples_per_shard=4)
    before = contents(tmp_path / "out")
    other = make_folder(tmp_path / "other", 3)
    for source, size in [(other, 4), (folder, 5), (folder, 13)]:
        with pytest.raises(DataError, match=r"shard-00000\d\.tar: already there"):
            write_shards(source, tmp_path / "out", samples_per_shard=size)
        assert contents(tmp_path / "out") == before
    same_size = tmp_path / "same"
    shutil.copytree(folder, same_size)
    (same_size / "fox-1.json").write_text('{"score": 4}')
    with pytest.raises(DataError, match=r"shard-000000\.tar: already there"):
        write_shards(same_size, tmp_path / "out", samples_per_shard=4)
    assert contents(tmp_path / "out") == before
    two = make_folder(tmp_path / "two", 2)
    write_shards(two, tmp_path / "small", samples_per_shard=1)
    (two / "fox-1.png").unlink()
    with pytest.raises(DataError, match=r"shard-000001\.tar: already there"):
        write_shards(two, tmp_path / "small", samples_per_shard=1)
    shutil.copy(tmp_path / "out" / "shard-000001.tar", tmp_path / "longer.tar")
    with (tmp_path / "out" / "shard-000001.tar").open("ab") as handle:
        handle.write(b"x")
    with pytest.raises(DataError, match=r"shard-000001\.tar: already there"):
        write_shards(folder, tmp_path / "out", samples_per_shard=4)


class Forward(io.RawIOBase):
    """A file that can only be read onwards; counts its bytes."""

    opened: ClassVar[list["Forward"]] = []

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self.handle = path.open("rb")
        self.opened.append(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self.handle.read(len(buffer))
        buffer[: len(data)] = data
        self.count += len(data)
        return len(data)


def test_tars_are_read_once_front_to_back(folder, tmp_path, monkeypatch):
    path = write_shards(folder, tmp_path, samples_per_shard=4)
    before = path.read_bytes()
    tars = sorted(tmp_path.glob("*.tar"))
    with tars[1].open("ab") as handle:
        handle.write(bytes(5000))

    @contextmanager
    def forward(place: Path):
        yield io.BufferedReader(Forward(place), 1000)

    monkeypatch.setattr(storage, "reading", forward)
    index_tars(tars, path, workers=1)
    assert [one.path for one in Forward.opened] == tars
    assert [one.count for one in Forward.opened] == [tar.stat().st_size for tar in tars]
    monkeypatch.undo()
    shard = ShardIndex(path).shards[1]
    data = tars[1].read_bytes()
    assert (shard.bytes, shard.sha256) == (len(data), sha256(data).hexdigest())
    assert path.read_bytes() != before
    assert verify(path) == []


def test_written_shards_are_not_read_again(folder, tmp_path):
    opened: list[str] = []
    listening = True

    def listen(event: str, arguments: tuple) -> None:
        if listening and event == "open" and isinstance(arguments[0], str):
            opened.append(arguments[0])

    sys.addaudithook(listen)
    write_shards(folder, tmp_path / "out", samples_per_shard=4)
    listening = False
    assert str(folder / "fox-1.txt") in opened
    assert not [name for name in opened if name.endswith(".tar")]
    assert verify(tmp_path / "out" / "index.json") == []


def test_a_sample_of_many_pictures_is_not_kept(tmp_path, monkeypatch):
    """Nor is what belongs to no sample: memory holds what a row is made of."""
    monkeypatch.setattr(images, "MAX_BYTES", 10_000)
    monkeypatch.setattr(tar_samples, "METADATA_LIMIT", 0)
    monkeypatch.setattr(tar_samples, "CAPTION_LIMIT", 0)
    members = [(f"a.{n}.png", bytes(9000)) for n in range(50)] + [("a.bin", bytes(9000))]
    path = tar_of(tmp_path / "x.tar", [*members, ("b.png", encoded(noise(8, 8)))])
    with path.open("rb") as handle:
        kept = [member.data for member in walk(handle, "x.tar", tar_samples._Keeper())]
    assert [data is not None for data in kept] == [True] * 2 + [False] * 49 + [True]
    report = index_tars([path], tmp_path / "index.json")
    assert report.samples == 1
    assert report.skipped == [f"{path}: a: 50 pictures in one sample; skipped"]


def test_a_caption_under_another_key(tmp_path):
    members = [
        ("a.png", encoded(noise(8, 8))),
        ("a.json", b'{"prompt": " a fox ", "caption": "b"}'),
    ]
    path = tar_of(tmp_path / "x.tar", members)
    for key, caption in [("prompt", "a fox"), ("caption", "b"), ("text", None)]:
        index_tars([path], tmp_path / "index.json", caption_key=key)
        assert open_source(tmp_path / "index.json").records[0].caption == caption


def test_a_pipe_among_the_tars_is_not_waited_for(folder, tmp_path):
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(DataError, match=r"x\.tar.*not a plain file"):
        index_tars([tmp_path / "x.tar"], tmp_path / "index.json")
    os.mkfifo(tmp_path / "shard-000000.tar")
    with pytest.raises(DataError, match=r"shard-000000\.tar.*not a plain file"):
        write_shards(folder, tmp_path)


def test_broken_input_stops_the_run_and_is_named(tmp_path):
    folder = make_folder(tmp_path / "in", 9)
    path = folder / "fox-5.png"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"fox-5\.png: damaged"):
        write_shards(folder, tmp_path / "out", samples_per_shard=2)
    assert "index.json" not in contents(tmp_path / "out")
    assert list((tmp_path / "out").glob(".*.tmp")) == []
    write_shards(folder, tmp_path / "unchecked", thorough=False)
    path.write_bytes(data)
    (folder / "fox-5.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match=r"fox-5\.txt: not UTF-8"):
        write_shards(folder, tmp_path / "out", samples_per_shard=2)
    (folder / "fox-5.txt").write_bytes(b"a fox")
    write_shards(folder, tmp_path / "out", samples_per_shard=2)
    assert len(open_source(tmp_path / "out").records) == 9


def test_a_failure_stops_the_other_workers(tmp_path):
    folder = make_folder(tmp_path / "in", 60)
    (folder / "fox-0.jpg").write_bytes(b"hello")
    told = []

    def progress(done: int, total: int) -> None:
        told.append(done)
        time.sleep(0.02)

    with pytest.raises(DataError, match=r"fox-0\.jpg"):
        write_shards(folder, tmp_path / "out", samples_per_shard=30, workers=2, progress=progress)
    assert len(told) < 20


def test_impossible_places(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures to pack"):
        write_shards(tmp_path / "empty", tmp_path / "out")
    pictures = make_folder(tmp_path / "in", 1)
    with pytest.raises(DataError, match="a folder of their own"):
        write_shards(pictures, pictures / ".." / "in")
    shutil.copy(pictures / "fox-0.jpg", pictures / "fox.0.jpg")
    shutil.copy(pictures / "fox-0.jpg", pictures / "fox_0.jpg")
    with pytest.raises(DataError, match=r"fox\.0\.jpg and fox_0\.jpg would both be 'fox_0'"):
        write_shards(pictures, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_runs_into_one_folder(folder, tmp_path):
    inside, go_on = threading.Event(), threading.Event()

    def hold(done: int, total: int) -> None:
        inside.set()
        go_on.wait(20)

    first = threading.Thread(
        target=write_shards, args=(folder, tmp_path), kwargs={"progress": hold}
    )
    first.start()
    assert inside.wait(20)
    with pytest.raises(UserError, match="in use by process"):
        write_shards(folder, tmp_path)
    go_on.set()
    first.join(20)
    assert len(open_source(tmp_path).records) == 13


def test_memory_is_flat(tmp_path):
    """The window of work ahead is bounded, however long the list of items."""
    from disttrain.data.workers import in_order

    begun, taken = [], 0
    stop = threading.Event()
    for result in in_order(lambda item: begun.append(item) or item, range(200), 2, stop):
        assert result == taken
        taken += 1
        time.sleep(0.0005)
        assert len(begun) - taken <= 5
    assert taken == 200


# Reading what is there


def test_shards_of_webdataset_are_read_by_us(tmp_path):
    pictures = [encoded(noise(20, 30, seed=n), "PNG") for n in range(5)]
    for shard, numbers in enumerate([(0, 1, 2), (3, 4)]):
        with webdataset.TarWriter(str(tmp_path / f"{shard}.tar")) as writer:
            for number in numbers:
                sample = {"__key__": f"part/{number:09d}", "png": pictures[number]}
                sample |= {"txt": f"fox {number}\n"} if number % 2 else {}
                sample |= {"json": {"caption": "from json", "width": 1}} if number < 3 else {}
                writer.write(sample)
    with webdataset.ShardWriter(str(tmp_path / "s-%06d.tar"), maxcount=2, verbose=0) as writer:
        for number in range(3):
            writer.write({"__key__": f"{number}", "jpg": encoded(noise(9, 9), "JPEG"), "cls": 3})
    tars = [tmp_path / "0.tar", tmp_path / "1.tar", *sorted(tmp_path.glob("s-*.tar"))]
    report = index_tars(tars, tmp_path / "index.json")
    assert (report.samples, report.skipped) == (8, [])
    source = open_source(report.path)
    expected = read_by_webdataset(*tars)
    assert [record.key for record in source.records] == [s["__key__"] for s in expected]
    for number, sample in enumerate(expected):
        assert source.read(number) == (sample.get("png") or sample.get("jpg"))
    captions = [record.caption for record in source.records]
    assert captions == ["from json", "fox 1", "from json", "fox 3", None, None, None, None]
    assert (source.records[0].width, source.records[0].height) == (30, 20)
    assert verify(report.path) == []


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_formats(tmp_path, form):
    picture = encoded(noise(8, 8))
    deep = "d" * 60 + "/" + "e" * 60
    names = ["./a.PNG", "x.y/b.png", f"{deep}/c.png"]
    if form != tarfile.USTAR_FORMAT:
        names += ["n" * 200 + ".png", "狐.png", "/".join(["f" * 90] * 3) + "/g.png"]
    path = tar_of(tmp_path / "x.tar", [(name, picture) for name in names], form)
    index_tars([path], tmp_path / "index.json")
    keys = [record.key for record in open_source(tmp_path / "index.json").records]
    assert keys == [name.removeprefix("./").rpartition(".")[0] for name in names]


def test_gnu_base_256_size(tmp_path):
    picture = encoded(noise(8, 8))
    path = tar_of(tmp_path / "x.tar", [("a.png", picture)])
    data = bytearray(path.read_bytes())
    data[124:136] = b"\x80" + len(picture).to_bytes(11, "big")
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + sum(data[156:512]) + 8 * 32)
    path.write_bytes(data)
    with tarfile.open(path) as archive:
        assert archive.getmembers()[0].size == len(picture)
    assert [member.size for member in walk(path.open("rb"), "x")] == [len(picture)]


def test_what_belongs_to_no_sample_is_passed_over(tmp_path):
    picture = encoded(noise(8, 8))
    members = [
        ("__meta__/a.png", picture),
        ("__info__", b"x"),
        ("README", b"x"),
        ("a.png", picture),
        ("a.pkl", b"cos\nsystem\n(S'touch hacked'\ntR."),
        ("a.pth", b"x"),
        ("._a.png", picture),
        ("__b__.png", picture),
    ]
    path = tar_of(tmp_path / "x.tar", members)
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo("folder")
        info.type, info.size = tarfile.DIRTYPE, 0
        archive.addfile(info)
    report = index_tars([path], tmp_path / "index.json")
    keys = [record.key for record in open_source(report.path).records]
    assert keys == ["a", "__b__"]
    assert keys == [sample["__key__"] for sample in read_by_webdataset(path)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", ("a", "jpg")),
        ("d.e/a.mask.PNG", ("d.e/a", "mask.png")),
        ("a", None),
        (".a.jpg", None),
        ("d/.jpg", None),
        ("__a__", None),
        ("__a__/b.jpg", None),
        ("__a__.jpg", ("__a__", "jpg")),
    ],
)
def test_split_name(name, expected):
    assert split_name(name) == expected


def test_unusable_samples_are_skipped_by_name(tmp_path, monkeypatch):
    picture = encoded(noise(8, 8))
    members = [
        ("good.png", picture),
        ("broken.png", b"hello"),
        ("nothing.txt", b"x"),
        ("both.png", picture),
        ("both.jpg", encoded(noise(8, 8), "JPEG")),
        ("text.png", picture),
        ("text.txt", b"\xff"),
        ("surrogate.png", picture),
        ("surrogate.json", b'{"caption": "\\ud800"}'),
        ("mask.png", picture),
        ("masked.png", picture),
        ("masked.mask.png", encoded(noise(9, 8, 1))),
        ("parts.1.png", picture),
        ("parts.mask.png", encoded(noise(8, 8, 1))),
        ("alone.mask.png", picture),
        ("list.png", picture),
        ("list.json", b'["caption"]'),
        ("long.png", picture),
        ("long.txt", b"x" * 41),
    ]
    monkeypatch.setattr("disttrain.data.tar_samples.CAPTION_LIMIT", 40)
    path = tar_of(tmp_path / "x.tar", members)
    report = index_tars([path], tmp_path / "index.json")
    source = open_source(report.path)
    assert [record.key for record in source.records] == ["good", "mask", "parts", "list"]
    assert [record.caption for record in source.records] == [None] * 4
    assert source.read_mask(2) is not None
    assert report.samples == 4
    named = [line.split(": ")[1].split(".")[0] for line in report.skipped]
    assert named == ["broken", "nothing", "both", "text", "surrogate", "masked", "alone", "long"]
    assert report.skipped[-1].endswith("'long.txt' of 41 bytes, the limit is 40")
    assert all(line.startswith(str(path)) for line in report.skipped)


def test_keys_that_restart_in_every_tar(tmp_path):
    (tmp_path / "d").mkdir()
    tars = []
    for shard, name in enumerate(["a.tar", "b.tar", "d/b.tar"]):
        members = [(f"{n}.png", encoded(noise(8, 8, seed=10 * shard + n))) for n in range(2)]
        tars.append(tar_of(tmp_path / name, members))
    source = open_source(index_tars(tars, tmp_path / "index.json").path)
    keys = [record.key for record in source.records]
    assert keys == ["0", "1", "b/0", "b/1", "d/b/0", "d/b/1"]
    assert [record.stem for record in source.records] == ["0", "1"] * 3
    with pytest.raises(DataError, match="given twice"):
        index_tars([tars[0], tars[0], tars[0]], tmp_path / "index.json")


def test_tars_elsewhere_and_moved_folders(folder, tmp_path):
    write_shards(folder, tmp_path / "out", samples_per_shard=5)
    tars = sorted((tmp_path / "out").glob("*.tar"))
    elsewhere = index_tars(tars, tmp_path / "index" / "index.json")
    assert open_source(elsewhere.path).read(0) == open_source(tmp_path / "out").read(0)
    expected = open_source(tmp_path / "out").read(12)
    (tmp_path / "out").rename(tmp_path / "moved")
    assert open_source(tmp_path / "moved").read(12) == expected
    with pytest.raises(DataError, match="No such file"):
        open_source(elsewhere.path).read(0)


def test_indexing_our_own_shards_gives_the_same_index(folder, tmp_path):
    path = write_shards(folder, tmp_path, samples_per_shard=5)
    before = path.read_bytes()
    index_tars(sorted(tmp_path.glob("*.tar")), path)
    assert path.read_bytes() == before


def test_patterns_of_tars(tmp_path):
    for name in ["000.tar", "001.tar", "002.tar", "010.tar", "x y.tar"]:
        (tmp_path / name).write_bytes(b"")
    numbered = [tmp_path / f"00{number}.tar" for number in range(3)]
    assert expand_patterns([f"{tmp_path}/{{000..002}}.tar"]) == numbered
    assert expand_patterns([f"{tmp_path}/00*.tar", str(numbered[1])]) == numbered
    assert expand_patterns([str(tmp_path / "x y.tar"), str(numbered[0])])[1] == numbered[0]
    with pytest.raises(DataError, match=r"y\*\.tar: matches no file"):
        expand_patterns([f"{tmp_path}/y*.tar"])
    assert expand_patterns([f"file://{tmp_path}/x%20y.tar"]) == [tmp_path / "x y.tar"]
    urls = [f"https://example.org/{number}.tar" for number in range(3)]
    assert expand_patterns(["https://example.org/{0..2}.tar", urls[1]]) == urls
    for pattern in ["pipe:cat x.tar", "ftp://example.org/x.tar", "zip://x.tar::s3://bucket/x.zip"]:
        with pytest.raises(DataError, match="not read; give a path, or a URL"):
            expand_patterns([pattern])
    with pytest.raises(DataError, match="backslash before a brace"):
        expand_patterns([f"{tmp_path}/{{0..1.tar"])
    for names in ["{0..9999999999}", "{0..9999}{0..9999}", "{5..-1000000}"]:
        with pytest.raises(DataError, match="more than 1000000 tars"):
            expand_patterns([f"https://example.org/{names}.tar"])


def bad_member(
    kind: bytes = tarfile.REGTYPE, name: str = "a.png", link: str = ""
) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    ("member", "words"),
    [
        (bad_member(tarfile.SYMTYPE, link="/etc/passwd"), "a symbolic link"),
        (bad_member(tarfile.LNKTYPE, link="b.png"), "a hard link"),
        (bad_member(tarfile.CHRTYPE), "a character device"),
        (bad_member(tarfile.BLKTYPE), "a block device"),
        (bad_member(tarfile.FIFOTYPE), "a pipe"),
        (bad_member(tarfile.GNUTYPE_SPARSE), "a sparse file"),
        (bad_member(b"Z"), "of unknown type"),
        (bad_member(name="/etc/a.png"), "names must stay inside"),
        (bad_member(name="../a.png"), "names must stay inside"),
        (bad_member(name="d/../../a.png"), "names must stay inside"),
        (bad_member(name="good.png"), "occurs twice"),
        (bad_member(name="./good.png"), "occurs twice"),
        (bad_member(name="good.txt"), "key 'good' occurs twice"),
        (bad_member(name="other.PNG"), r"two \.png members"),
    ],
)
def test_unsafe_members_are_refused(tmp_path, member, words):
    path = tar_of(tmp_path / "x.tar", [("good.png", b"x"), ("other.png", b"x")])
    with tarfile.open(path, "a") as archive:
        archive.addfile(member)
    with pytest.raises(DataError, match=words):
        index_tars([path], tmp_path / "index.json")
    assert not (tmp_path / "index.json").exists()


def test_records_for_all_members_and_sparse_records_are_refused(tmp_path):
    for number, headers in enumerate([{"path": "x.png"}, {"GNU.sparse.major": "1"}]):
        with tarfile.open(tmp_path / "x.tar", "w", pax_headers=headers) as archive:
            archive.addfile(bad_member())
        with pytest.raises(DataError, match=["one name for all", "sparse"][number]):
            index_tars([tmp_path / "x.tar"], tmp_path / "index.json")


def walked(path: Path) -> tuple[list[str], str]:
    """Names that `walk` gives, and its complaint."""
    names: list[str] = []
    try:
        with path.open("rb") as handle:
            names.extend(member.name for member in walk(handle, "x.tar"))
    except DataError as error:
        return names, str(error)
    return names, ""


def test_a_damaged_header_is_not_the_end(tmp_path):
    path = tar_of(tmp_path / "x.tar", [(f"{n}.png", bytes(600)) for n in range(4)])
    data = bytearray(path.read_bytes())
    data[2 * 1536] ^= 1
    path.write_bytes(data)
    with tarfile.open(path) as archive:
        assert archive.getnames() == ["0.png", "1.png"], "what the standard library makes of it"
    assert walked(path)[1] == "x.tar: damaged header at byte 3072; fetch or write it again"


def test_cut_archives(tmp_path):
    path = tar_of(tmp_path / "x.tar", [(f"{n}.png", bytes(600)) for n in range(3)])
    data = path.read_bytes()
    assert walked(path) == (["0.png", "1.png", "2.png"], "")
    for length, count, words in [
        (512, 0, "cut short within '0.png'"),
        (512 + 599, 0, "cut short within '0.png'"),
        (1536 + 100, 1, "not a whole tar archive"),
        (2 * 1536 + 512 + 30, 2, "cut short within '2.png'"),
        (3 * 1536, 3, "not a whole tar archive"),
        (3 * 1536 + 512, 3, ""),
    ]:
        path.write_bytes(data[:length])
        names, complaint = walked(path)
        assert len(names) == count
        assert words in complaint
        assert bool(words) == bool(complaint)


def test_names_outside_samples_must_be_unique_too(tmp_path):
    path = tar_of(tmp_path / "x.tar", [("README", b"x"), ("README", b"y")])
    assert walked(path) == (
        ["README"],
        "x.tar: member 'README' occurs twice; write the shard again",
    )


def test_the_size_of_a_folder_means_nothing(tmp_path):
    path = tar_of(tmp_path / "x.tar", [("d", b""), ("d/a.png", b"x")])
    data = bytearray(path.read_bytes())
    data[156:157], data[124:136] = tarfile.DIRTYPE, b"%011o\0" % 700
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + sum(data[156:512]) + 256)
    path.write_bytes(data)
    assert walked(path) == (["d/a.png"], "")


@pytest.mark.parametrize("size", ["12x", "-5", "9" * 30, "²"])
def test_impossible_size_records(tmp_path, size):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        info = bad_member()
        info.pax_headers = {"size": size}
        archive.addfile(info)
    assert walked(tmp_path / "x.tar") == ([], "x.tar: damaged size record at byte 1024")


def test_huge_name_records_are_not_read(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        info = bad_member()
        info.pax_headers = {"comment": "x" * 2**21}
        archive.addfile(info)
    assert "a name record of" in walked(tmp_path / "x.tar")[1]


@pytest.mark.parametrize("mode", ["w:gz", "w:xz"])
def test_compressed_tars_are_refused_with_advice(tmp_path, mode):
    with tarfile.open(tmp_path / "x.tar", mode) as archive:
        archive.addfile(bad_member())
    with pytest.raises(DataError, match="a compressed archive"):
        index_tars([tmp_path / "x.tar"], tmp_path / "index.json")


def test_oversized_members_are_refused(tmp_path, monkeypatch):
    path = tar_of(tmp_path / "x.tar", [("a.png", encoded(noise(9, 9))), ("b.png", b"x")])
    monkeypatch.setattr("disttrain.data.images.MAX_BYTES", 100)
    with pytest.raises(DataError, match="no sample to index"):
        index_tars([path], tmp_path / "index.json")


def test_a_failure_stops_the_reading_of_others(tmp_path, monkeypatch):
    long = [(f"{n}.png", encoded(noise(8, 8))) for n in range(200)]
    tars = [tar_of(tmp_path / "a.tar", long), tmp_path / "absent.tar"]
    looked = []
    check = tar_samples.check_picture

    def slow(*arguments):
        looked.append(arguments)
        time.sleep(0.02)
        return check(*arguments)

    monkeypatch.setattr(tar_samples, "check_picture", slow)
    with pytest.raises(DataError, match="absent"):
        index_tars([tars[1], tars[0]], tmp_path / "index.json", workers=2)
    assert len(looked) < 50


def test_missing_tars_and_nothing_to_index(tmp_path):
    with pytest.raises(DataError, match=r"x\.tar: No such file"):
        index_tars([tmp_path / "x.tar"], tmp_path / "index.json")
    with pytest.raises(DataError, match="no sample to index"):
        index_tars([], tmp_path / "index.json")
    (tmp_path / "x.tar").write_bytes(b"")
    with pytest.raises(DataError, match="not a whole tar archive"):
        index_tars([tmp_path / "x.tar"], tmp_path / "index.json")


# Damage


def test_verify_names_the_damage(folder, tmp_path):
    path = write_shards(folder, tmp_path, samples_per_shard=4)
    assert verify(path) == []
    row = ShardIndex(path).row(1)
    shard = tmp_path / "shard-000000.tar"
    whole = shard.read_bytes()
    data = bytearray(whole)
    data[row.offset + 30] ^= 1
    shard.write_bytes(data)
    assert verify(path) == [f"{shard}: {row.key}: picture damaged"]
    data = bytearray(whole)
    data[ShardIndex(path).row(0).offset - 100] ^= 1
    shard.write_bytes(data)
    assert verify(path) == [f"{shard}: damaged outside of its pictures"]
    cut = ShardIndex(path).row(3).offset + 10
    shard.write_bytes(whole[:cut])
    found = verify(path)
    assert found[0] == f"{shard}: {cut} bytes instead of {len(whole)}"
    assert f"{shard}: {ShardIndex(path).row(3).key}: picture damaged" in found
    shard.unlink()
    (tmp_path / "shard-000001.tar").unlink()
    assert verify(path) == [
        f"{tmp_path / name}: missing" for name in ("shard-000000.tar", "shard-000001.tar")
    ]
    path.write_bytes(path.read_bytes()[:-9])
    assert len(verify(path)) == 1


def test_reading_never_gives_damaged_bytes(folder, tmp_path):
    path = write_shards(folder, tmp_path)
    source = open_source(path)
    good = source.read(4)
    shard = tmp_path / "shard-000000.tar"
    with shard.open("r+b") as handle:
        handle.seek(source.index.row(3).offset + 10)
        handle.write(b"\0\1\2\3")
    assert source.read(4) == good
    with pytest.raises(DataError, match=r"shard-000000\.tar: fox-3: damaged"):
        source.read(3)
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(DataError, match="not a plain file"):
        open_source(path).read(3)


def test_a_changed_index_is_noticed(folder, tmp_path):
    path = write_shards(folder, tmp_path / "out", samples_per_shard=5)
    digest = open_source(path).digest
    whole = path.read_bytes()
    path.write_bytes(whole.replace("a fox, Füchse 7".encode(), "a cat, Füchse 7".encode()))
    source = open_source(path)
    assert source.records[0].key == "fox-0"
    with pytest.raises(DataError, match=r"lines of shard shard-000001\.tar were changed"):
        _ = source.records[7]
    (folder_b := tmp_path / "b").mkdir()
    for found in folder.iterdir():
        shutil.copy(found, folder_b)
    assert (
        open_source(write_shards(folder_b, tmp_path / "same", samples_per_shard=5)).digest == digest
    )
    (folder_b / "fox-7.txt").write_text("a cat")
    assert open_source(write_shards(folder_b, tmp_path / "c", samples_per_shard=5)).digest != digest


def test_an_index_with_lines_missing_or_counted_wrong(folder, tmp_path):
    path = write_shards(folder, tmp_path, samples_per_shard=5)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join(lines[:7] + lines[8:]))
    with pytest.raises(DataError, match="its length does not fit"):
        open_source(path)
    for wrong in (b'"samples":4', b'"samples":6'):
        path.write_bytes(b"\n".join(lines).replace(b'"samples":5', wrong, 1))
        source = open_source(path)
        with pytest.raises(DataError, match="another number of lines"):
            _ = source.records[0]
    for wrong in (b'"samples":0', b'"samples":-5', b'"samples":5.0', b'"samples":true'):
        path.write_bytes(b"\n".join(lines).replace(b'"samples":5', wrong, 1))
        with pytest.raises(DataError, match=r"impossible values in its list|length does not fit"):
            open_source(path)
    path.write_bytes(b"\n".join(lines).replace(b'"samples":5', b'"samples":' + b"9" * 25, 1))
    with pytest.raises(DataError, match="damaged index"):
        open_source(path)


@pytest.mark.parametrize(
    "change",
    [{"offset": -1}, {"size": 10**9}, {"width": 0}, {"offset": 1.5}, {"key": 3}, {"caption": 3}],
)
def test_rows_with_impossible_values(tmp_path, change):
    values = {"key": "a", "offset": 0, "size": 9, "sha256": "0", "width": 8, "height": 8} | change
    entry = ShardEntry("x.tar", "0" * 64, 1000, 1)
    write_index(tmp_path / "index.json", [(entry, [SampleRow(**values)])])
    with pytest.raises(DataError, match="impossible values for"):
        _ = open_source(tmp_path / "index.json").records[0]


def test_a_reformatted_index_still_works(folder, tmp_path):
    path = write_shards(folder, tmp_path, samples_per_shard=5)
    before = open_source(path)
    records = list(before.records)
    value = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(value, indent=1, ensure_ascii=True))
    after = open_source(path)
    assert list(after.records) == records
    assert after.digest == before.digest
    value["version"] = 2
    path.write_text(json.dumps(value))
    with pytest.raises(DataError, match="index version 2 is not 1"):
        open_source(path)
    path.write_text("{}")
    with pytest.raises(DataError, match="not an index of shards"):
        open_source(path)


@pytest.mark.parametrize(
    ("name", "digest", "words"),
    [
        ("pipe:touch hacked", "0" * 64, "not read; give a path"),
        ("ftp://example.org/x.tar", "0" * 64, "not read; give a path"),
        ("simplecache::https://example.org/x.tar", "0" * 64, "not read; give a path"),
        ("https://example.org/x.tar::zip://a.tar", "0" * 64, "not read; give a path"),
        ("x.tar", "../" * 10, "impossible values in its list of shards"),
        ("x\n.tar", "0" * 64, "impossible values in its list of shards"),
    ],
)
def test_shards_behind_commands_and_other_places_are_refused(tmp_path, name, digest, words):
    row = SampleRow("a", 0, 1, "0" * 64, 1, 1)
    write_index(tmp_path / "index.json", [(ShardEntry(name, digest, 10, 1), [row])])
    with pytest.raises(DataError, match=words):
        open_source(tmp_path / "index.json")


def test_a_million_samples_open_at_once(tmp_path, monkeypatch):
    counter = iter(range(1_000_000))
    # The same line layout as SampleRow.line, without its cost a million times over.
    text = (
        '{{"caption":"a fox","height":7,"key":"{}","mask":null,"offset":0,'
        '"sha256":"{}","size":9,"width":8}}'
    )
    monkeypatch.setattr(
        SampleRow, "line", lambda row: text.format(next(counter), "0" * 64).encode()
    )
    rows = [SampleRow("", 0, 9, "", 8, 7)] * 1000
    path = tmp_path / "index.json"
    write_index(path, ((ShardEntry(f"{n}.tar", "0" * 64, 10, 1000), rows) for n in range(1000)))
    start = time.monotonic()
    source = ShardSource(path)
    assert len(source.records) == 1_000_000
    assert source.records[765_432].key == "765432"
    assert time.monotonic() - start < 1
    picks = np.random.default_rng(0).integers(0, 1_000_000, 200)
    assert [source.records[int(pick)].key for pick in picks] == [str(pick) for pick in picks]
    start = time.monotonic()
    shapes = source.shapes()
    assert time.monotonic() - start < 5
    assert shapes.shape == (1_000_000, 2)
    assert (shapes == (7, 8)).all()


def test_shapes_come_from_checked_lines_alone(folder, tmp_path):
    path = write_shards(folder, tmp_path, samples_per_shard=5)
    value = json.loads(path.read_text("utf-8"))
    expected = [[row["height"], row["width"]] for row in value["samples"]]
    assert open_source(path).shapes().tolist() == expected
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"height":24', b'"height":42', 1))
    with pytest.raises(DataError, match="lines of shard shard-000000\\.tar were changed"):
        open_source(path).shapes()


def test_shapes_of_lines_in_another_layout(tmp_path, monkeypatch):
    line = SampleRow.line
    monkeypatch.setattr(SampleRow, "line", lambda row: line(row).replace(b'":', b'" : '))
    rows = [SampleRow(str(n), 0, 9, "0", 8 + n, 5) for n in range(3)]
    write_index(tmp_path / "index.json", [(ShardEntry("x.tar", "0" * 64, 10, 3), rows)])
    shapes = open_source(tmp_path / "index.json").shapes()
    assert shapes.tolist() == [[5, 8], [5, 9], [5, 10]]


def test_the_line_layout_is_the_documented_one():
    line = SampleRow("k", 1, 9, "0", 8, 7, "a fox").line()
    assert line == (
        b'{"caption":"a fox","height":7,"key":"k","mask":null,"offset":1,'
        b'"sha256":"0","size":9,"width":8}'
    )


def test_mutated_shards_and_indexes(tmp_path):
    """Every mutation is refused as data, or the bytes that are read are the right ones."""
    folder = make_folder(tmp_path / "in", 4)
    path = write_shards(folder, tmp_path / "out", samples_per_shard=2)
    originals = contents(tmp_path / "out")
    truth = {
        record.key: open_source(path).read(n) for n, record in enumerate(open_source(path).records)
    }
    draw = random.Random(5)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(300):
        name = draw.choice(sorted(originals))
        data = bytearray(originals[name])
        how = draw.random()
        place = draw.randrange(len(data))
        if how < 0.3:
            data = data[:place]
        elif how < 0.4:
            data[place:place] = draw.randbytes(draw.choice([1, 512]))
        else:
            for _ in range(draw.choice([1, 4, 30])):
                data[draw.randrange(len(data))] = draw.choice([0, 32, 48, 255, draw.randrange(256)])
        (tmp_path / "out" / name).write_bytes(data)
        start = time.monotonic()
        try:
            source = open_source(path)
            count = len(source.records)
        except DataError:
            count = 0
            outcomes["refused"] += 1
        for number in range(min(count, 10)):
            try:
                record, found = source.records[number], source.read(number)
            except DataError:
                outcomes["refused"] += 1
            else:
                assert found == truth[record.key]
                outcomes["read"] += 1
        verify(path)
        try:
            index_tars(
                [tmp_path / "out" / n for n in originals if n[-1] == "r"], tmp_path / "i.json"
            )
        except DataError:
            outcomes["refused"] += 1
        assert time.monotonic() - start < 2
        (tmp_path / "out" / name).write_bytes(originals[name])
    assert min(outcomes.values()) > 100


def test_mutated_headers_with_right_checksums(tmp_path):
    """Header fields of every kind, wrong but with a checksum that fits."""
    picture = encoded(noise(8, 8))
    names = ["a.png", "狐" * 60 + ".png", "b.png"]
    draw = random.Random(6)
    outcomes = {True: 0, False: 0}
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tar_of(tmp_path / "x.tar", [(name, picture) for name in names], form)
        original = path.read_bytes()
        headers = [
            n for n in range(0, len(original), 512) if original[n + 257 : n + 262] == b"ustar"
        ]
        for _ in range(300):
            data = bytearray(original)
            start = draw.choice(headers)
            for _ in range(draw.choice([1, 3])):
                if draw.random() < 0.4:
                    data[start + 512 + draw.randrange(60)] = draw.randrange(256)
                else:
                    data[start + draw.randrange(512)] = draw.choice(
                        [0, 47, 48, 46, draw.randrange(256)]
                    )
            checked = sum(data[start : start + 148]) + sum(data[start + 156 : start + 512]) + 256
            data[start + 148 : start + 156] = b"%06o\0 " % checked
            path.write_bytes(data)
            try:
                with path.open("rb") as handle:
                    members = list(walk(handle, "x.tar"))
            except DataError as error:
                outcomes[False] += 1
                message = str(error)
                assert message.isprintable(), message
            else:
                outcomes[True] += 1
                assert all(m.offset + m.size <= len(data) for m in members)
                assert not any(m.name.startswith("/") or ".." in m.name.split("/") for m in members)
    assert min(outcomes.values()) > 50
