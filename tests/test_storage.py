"""Places and remote shards: what is read, and what a bad server can do to it (nothing)."""

import io
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pictures import encoded, make_folder, noise
from web import Web, serving

from disttrain import files
from disttrain.cli import main
from disttrain.data import shard_cache, shard_source, storage
from disttrain.data.index import ShardIndex
from disttrain.data.indexing import expand_patterns, index_tars, verify
from disttrain.data.shards import write_shards
from disttrain.data.source import ShardSource, SourceOptions, open_source
from disttrain.data.storage import beside, place_of
from disttrain.errors import DataError


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(storage, "PAUSES", (0.01, 0.02, 0.03))
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def local(tmp_path) -> ShardSource:
    """Shards in a folder that the server shows; three pictures a shard."""
    folder = make_folder(tmp_path / "in", 10)
    (folder / "fox-1.mask.png").write_bytes(encoded(noise(24, 32, 1)))
    source = open_source(write_shards(folder, tmp_path / "web", samples_per_shard=3))
    assert isinstance(source, ShardSource)
    return source


@pytest.fixture
def web(local, tmp_path):
    with serving(tmp_path / "web") as web:
        yield web


@pytest.fixture
def options(tmp_path) -> SourceOptions:
    return SourceOptions(shard_folder=tmp_path / "kept")


def shard(number: int) -> str:
    return f"shard-{number:06d}.tar"


def kept(options: SourceOptions) -> set[Path]:
    assert options.shard_folder is not None
    return set((options.shard_folder / "shards").glob("*"))


# Places


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("a/b.tar", Path("a/b.tar")),
        ("C:shards", Path("C:shards")),
        ("http:x", Path("http:x")),
        ("file:a.tar", Path("a.tar")),
        ("file:/a/b%20c.tar", Path("/a/b c.tar")),
        ("file:///a.tar", Path("/a.tar")),
        ("FILE://localhost/a.tar", Path("/a.tar")),
        ("HTTPS://example.org/a.tar?x=1", "https://example.org/a.tar?x=1"),
        ("http://[::1]:8000/a.tar", "http://[::1]:8000/a.tar"),
        ("s3://bucket/a#b.tar", "s3://bucket/a#b.tar"),
        ("gs://bucket/a.tar", "gs://bucket/a.tar"),
    ],
)
def test_places_that_are_read(where, expected):
    assert place_of(where) == expected


@pytest.mark.parametrize(
    "where",
    [
        "pipe:curl http://example.org/x.tar",
        "PIPE:cat x.tar",
        "ftp://example.org/x.tar",
        "simplecache::https://example.org/x.tar",
        "https://example.org/x.zip::zip://x.tar",
        "memory://x.tar",
        "https://example.org/\nx.tar",
        "file://other/x.tar",
        "https:///x.tar",
        "https://example.org",
        "s3://bucket",
        "http://[::1/x.tar",
    ],
)
def test_places_that_are_refused(where):
    with pytest.raises(DataError) as caught:
        place_of(where)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("index", "name", "expected"),
    [
        (Path("d/index.json"), "../x.tar", Path("d/../x.tar")),
        (Path("d/index.json"), "/x.tar", Path("/x.tar")),
        (Path("d/index.json"), "s3://bucket/x.tar", "s3://bucket/x.tar"),
        ("https://h/d/index.json?key=1", "e/x y#.tar", "https://h/d/e/x%20y%23.tar"),
        ("s3://bucket/d#/index.json", "x y#.tar", "s3://bucket/d#/x y#.tar"),
        ("https://h/index.json", "gs://bucket/x.tar", "gs://bucket/x.tar"),
    ],
)
def test_names_count_from_their_index(index, name, expected):
    assert beside(index, name) == expected


@pytest.mark.parametrize("name", ["/etc/x.tar", "file:x.tar", "file:///x.tar", "d/../../x.tar"])
def test_a_remote_index_names_nothing_local(name):
    with pytest.raises(DataError, match=r"index\.json: names"):
        beside("https://h/d/index.json", name)


def test_nothing_but_the_schemes_reaches_fsspec(local, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    open_source(f"file://{tmp_path}/web/index.json").read(0)
    open_source(tmp_path / "in").read(0)
    for where in ["pipe:cat x.json", "simplecache::http://h/x.json"]:
        with pytest.raises(DataError, match="not read; give a path"):
            open_source(where)


@pytest.mark.parametrize(
    ("scheme", "module"), [("https", "aiohttp"), ("s3", "s3fs"), ("gs", "gcsfs")]
)
def test_a_missing_package_is_named(monkeypatch, scheme, module, options):
    monkeypatch.setitem(sys.modules, module, None)
    storage._filesystem.cache_clear()
    extra = "http" if scheme == "https" else scheme
    with pytest.raises(DataError, match=rf"pip install 'disttrain\[{extra}\]'") as caught:
        open_source(f"{scheme}://bucket/index.json", options)
    assert "\n" not in str(caught.value)
    storage._filesystem.cache_clear()


# Indexing


def test_remote_tars_are_indexed_in_one_stream_each(local, web, tmp_path, capsys):
    index = tmp_path / "made" / "index.json"
    pattern = web.url("shard-{000000..000003}.tar")
    assert main(["shard", "--index", pattern, "--output", str(index), "--workers", "2"]) == 0
    assert f"wrote {index} (10 samples)" in capsys.readouterr().out
    assert sorted(web.asked) == [shard(n) for n in range(4)]
    made, whole = ShardIndex(index), local.index
    assert [entry.file for entry in made.shards] == [web.url(shard(n)) for n in range(4)]
    assert [made.row(n) for n in range(10)] == [whole.row(n) for n in range(10)]
    assert [entry.sha256 for entry in made.shards] == [entry.sha256 for entry in whole.shards]
    assert verify(index) == []
    assert main(["shard", "--verify", web.url("index.json")]) == 0


def test_verify_names_remote_damage(local, web, tmp_path):
    index = tmp_path / "index.json"
    index_tars(expand_patterns([web.url("shard-{000000..000003}.tar")]), index)
    (tmp_path / "web" / shard(0)).unlink()
    web.faults[shard(1)] = ["flip"]
    web.faults[shard(2)] = ["cut"]
    assert verify(index, workers=1) == [
        f"{web.url(shard(0))}: no such file",
        f"{web.url(shard(1))}: damaged (its digest does not fit the index)",
    ]


@pytest.mark.parametrize("fault", ["refuse", "cut"])
def test_what_passes_is_tried_again_and_what_stays_is_told(local, web, tmp_path, fault):
    web.faults[shard(0)] = [fault] * 3
    report = index_tars([web.url(shard(0))], tmp_path / "a.json")
    assert (report.samples, report.skipped) == (3, [])
    assert web.fetched(shard(0)) == 4
    web.faults[shard(0)] = [fault] * 4
    with pytest.raises(DataError, match=r"shard-000000\.tar: .*\(4 attempts\)") as caught:
        index_tars([web.url(shard(0))], tmp_path / "b.json")
    assert str(caught.value).isprintable()
    assert not (tmp_path / "b.json").exists()


def test_what_will_not_pass_is_not_tried_again(web, tmp_path):
    web.faults[shard(0)] = ["forbid"]
    for name, words in [(shard(0), "refused .status 403"), ("x.tar", "no such file")]:
        with pytest.raises(DataError, match=words):
            index_tars([web.url(name)], tmp_path / "index.json")
        assert web.fetched(name) == 1


@pytest.mark.parametrize("fault", ["silent", "drip", "trickle"])
def test_a_server_that_stalls_is_left(web, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(storage, "PATIENCE", 0.3)
    storage._filesystem.cache_clear()
    web.faults[shard(0)] = [fault] * 4
    start = time.monotonic()
    with pytest.raises(DataError, match=r"no answer within|only \d+ bytes in"):
        index_tars([web.url(shard(0))], tmp_path / "index.json")
    assert time.monotonic() - start < 5
    storage._filesystem.cache_clear()


def test_a_port_where_nobody_listens(web, tmp_path):
    web.shutdown()
    web.server_close()
    with pytest.raises(DataError, match=r"x\.tar: .*\(4 attempts\)") as caught:
        index_tars([web.url("x.tar")], tmp_path / "index.json")
    assert str(caught.value).isprintable()


def test_cancelling_does_not_wait_for_the_store(web, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "PAUSES", (60.0,))
    web.faults[shard(1)] = ["refuse"]
    web.faults[shard(0)] = ["forbid"]
    start = time.monotonic()
    with pytest.raises(DataError, match="status 403"):
        index_tars([web.url(shard(n)) for n in range(2)], tmp_path / "index.json", workers=2)
    assert time.monotonic() - start < 5


# Reading remote shards


def test_remote_shards_look_like_local_ones(local, web, options):
    remote = open_source(web.url("index.json"), options)
    assert remote.digest == local.digest
    assert remote.where == web.url("index.json")
    assert list(remote.records) == list(local.records)
    assert (list(remote.sizes), remote.shapes().tolist()) == ([3, 3, 3, 1], local.shapes().tolist())
    assert web.asked == ["index.json"], "shards are fetched when they are touched"
    assert remote.read_mask(1) == local.read_mask(1) is not None
    assert web.asked == ["index.json", shard(0)]
    for number in (0, 2, 9, 1):
        assert remote.read(number) == local.read(number)
    assert web.asked == ["index.json", shard(0), shard(3)]
    copy = pickle.loads(pickle.dumps(remote))
    assert copy.read(9) == local.read(9)
    assert copy.where == remote.where
    assert open_source(web.url("index.json"), options).read(0) == local.read(0)
    assert web.asked == ["index.json", shard(0), shard(3)], "what is kept is not fetched again"
    names = {path.name for path in kept(options)}
    assert names == {f"{local.index.shards[n].sha256}.tar" for n in (0, 3)}


def test_a_local_index_of_remote_shards(local, web, tmp_path, options):
    index = tmp_path / "made" / "index.json"
    index_tars(expand_patterns([web.url("shard-{000000..000003}.tar")]), index)
    source = open_source(index, options)
    assert [source.read(n) for n in range(10)] == [local.read(n) for n in range(10)]
    with pytest.raises(DataError, match="need a folder for their copies"):
        open_source(index)
    with pytest.raises(DataError, match="need a folder for their copies"):
        open_source(web.url("index.json"))
    with pytest.raises(DataError, match=r"give the URL of an index\.json"):
        open_source(web.url(shard(0)), options)


@pytest.mark.parametrize("tags", [True, False])
def test_a_changed_index_is_always_noticed(local, tmp_path, options, tags):
    with serving(tmp_path / "web", tags) as web:
        first = open_source(web.url("index.json"), options)
        for _ in range(2):
            assert open_source(web.url("index.json"), options).digest == first.digest
        assert web.fetched("index.json") == (1 if tags else 3)
        path = tmp_path / "web" / "index.json"
        status = path.stat()
        other = write_shards(make_folder(tmp_path / "other", 9), tmp_path / "o")
        path.write_bytes(other.read_bytes())
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        second = open_source(web.url("index.json"), options)
        assert len(second.records) == 9
        assert second.digest != first.digest
        assert len(first.records) == 10
        assert pickle.loads(pickle.dumps(first)).digest == first.digest


def test_an_index_that_is_cut_or_none_is_not_kept(local, web, tmp_path, options):
    path = tmp_path / "web" / "index.json"
    whole = path.read_bytes()
    for data, words in [
        (whole[:-30], "damaged index|not JSON"),
        (b"<html>", r"\d/index\.json: not JSON"),
    ]:
        path.write_bytes(data)
        with pytest.raises(DataError, match=words):
            open_source(web.url("index.json"), options)
    web.faults["index.json"] = ["cut", "refuse"]
    path.write_bytes(whole)
    assert len(open_source(web.url("index.json"), options).records) == 10
    with pytest.raises(DataError, match=r"absent\.json: no such file"):
        open_source(web.url("absent.json"), options)


def test_a_copy_of_an_index_that_goes_bad_leaves(local, web, options):
    open_source(web.url("index.json"), options)
    (path,) = (options.shard_folder / "indexes").glob("*.json")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"\d/index\.json: "):
        open_source(web.url("index.json"), options)
    assert open_source(web.url("index.json"), options).digest == local.digest


def test_a_wrong_shard_is_fetched_twice_then_told(local, web, options):
    remote = open_source(web.url("index.json"), options)
    web.faults[shard(0)] = ["flip"]
    assert remote.read(0) == local.read(0)
    assert web.fetched(shard(0)) == 2
    web.faults[shard(1)] = ["flip"] * 2
    with pytest.raises(DataError, match=r"shard-000001\.tar: not what the index describes"):
        remote.read(3)
    assert web.fetched(shard(1)) == 2
    with pytest.raises(DataError, match=r"shard-000001\.tar: not what the index describes"):
        remote.read(4)
    assert web.fetched(shard(1)) == 2, "a shard that failed rests"
    assert {path.suffix for path in kept(options)} == {".tar"}
    assert len(kept(options)) == 1


def test_a_shard_that_failed_is_tried_again_later(local, web, options, monkeypatch):
    remote = open_source(web.url("index.json"), options)
    web.faults[shard(0)] = ["forbid"]
    with pytest.raises(DataError, match="status 403"):
        remote.read(0)
    monkeypatch.setattr(shard_source, "REST", 0.0)
    assert remote.read(0) == local.read(0)


def test_a_shard_of_another_size_is_not_kept(local, web, tmp_path, options):
    remote = open_source(web.url("index.json"), options)
    path = tmp_path / "web" / shard(0)
    whole = path.read_bytes()
    for data, words in [
        (whole + bytes(4_000_000), "more than its"),
        (whole[:-1], "another digest"),
    ]:
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"000\.tar: not what the index describes \({words}"):
            open_source(web.url("index.json"), options).read(0)
        assert kept(options) == set()
    path.write_bytes(whole)
    assert remote.read(0) == local.read(0)


@pytest.mark.parametrize("how", ["flipped", "cut", "pipe"])
def test_a_copy_that_goes_bad_is_fetched_again(local, web, options, how):
    open_source(web.url("index.json"), options).read(1)
    (path,) = kept(options)
    data = bytearray(path.read_bytes())
    data[local.index.row(1).offset + 40] ^= 1
    path.unlink()
    if how == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(data if how == "flipped" else data[:700])
    remote = open_source(web.url("index.json"), options)
    if how == "pipe":
        with pytest.raises(DataError, match="not a plain file"):
            remote.read(1)
    else:
        assert remote.read(1) == local.read(1)
        assert web.fetched(shard(0)) == 2


def test_an_index_that_lies_about_a_picture(local, web, tmp_path, options):
    path = tmp_path / "web" / "index.json"
    row, second = local.index.row(0), local.read(1)
    value = path.read_bytes().replace(row.sha256.encode(), b"0" * 64)
    entry = local.index.shards[0]
    start = value.index(b'"samples":[\n') + len(b'"samples":[\n')
    block = files.sha256_bytes(value[start : start + entry.index_bytes])
    path.write_bytes(value.replace(entry.index_sha256.encode(), block.encode()))
    remote = open_source(web.url("index.json"), options)
    for _ in range(3):
        with pytest.raises(DataError, match="fox-0: damaged"):
            remote.read(0)
    assert remote.read(1) == second
    assert web.fetched(shard(0)) == 2


# Room


def sizes(local: ShardSource) -> list[int]:
    return [entry.bytes for entry in local.index.shards]


def test_the_least_recently_used_leave(local, web, tmp_path):
    room = sum(sizes(local)[:2]) + sizes(local)[3] // 2
    options = SourceOptions(shard_folder=tmp_path / "kept", shard_bytes=room)
    names = [entry.sha256 for entry in local.index.shards]

    def there_after(number: int) -> list[int]:
        """The shards that are kept once somebody read a sample and left."""
        assert open_source(web.url("index.json"), options).read(number) == local.read(number)
        time.sleep(0.02)  # file systems have a clock of some milliseconds
        return sorted(names.index(path.stem) for path in kept(options))

    assert there_after(0) == [0]
    assert there_after(3) == [0, 1]
    assert there_after(1) == [0, 1]  # shard 0 is now the last used
    assert there_after(9) == [0, 3]
    assert there_after(3) == [1, 3]
    assert web.fetched(shard(1)) == 2


def test_what_is_in_use_stays(local, web, tmp_path):
    options = SourceOptions(shard_folder=tmp_path / "kept", shard_bytes=1)
    remote = open_source(web.url("index.json"), options)
    for number in (0, 3, 6):
        remote.read(number)
    assert len(kept(options)) == 3, "over the limit rather than gone while somebody reads"
    other = open_source(web.url("index.json"), options)
    del remote
    other.read(9)
    assert len(kept(options)) == 1


def test_files_of_killed_fetchers_are_cleared(local, web, options, monkeypatch):
    monkeypatch.setattr(shard_cache, "_ABANDONED", -1.0)
    remote = open_source(web.url("index.json"), options)
    remote.read(0)
    folder = next(iter(kept(options))).parent
    (folder / ".content.abc.tmp").write_bytes(b"left")
    with files.content_writer(folder, ".tar") as writer:
        writer.write(b"somebody is writing this")
        remote.read(3)
        assert len([path for path in kept(options) if path.suffix == ".tmp"]) == 1
    assert len([path for path in kept(options) if path.suffix == ".tar"]) == 3


def test_a_folder_that_cannot_be_written(local, web, tmp_path):
    (tmp_path / "kept").write_text("in the way")
    options = SourceOptions(shard_folder=tmp_path / "kept")
    with pytest.raises(DataError, match="kept: "):
        open_source(web.url("index.json"), options)
    (tmp_path / "kept").unlink()
    remote = open_source(web.url("index.json"), options)
    (tmp_path / "kept" / "shards").write_text("in the way")
    for _ in range(2):
        with pytest.raises(DataError, match="kept: "):
            remote.read(0)
    assert web.fetched(shard(0)) <= 1


# Sharing


def test_many_threads_and_sources_fetch_once(local, web, options):
    web.pause = 0.1
    sources = [open_source(web.url("index.json"), options) for _ in range(3)]

    def work(number: int) -> bool:
        return all(sources[number % 3].read(n) == local.read(n) for n in range(10))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))
    assert sorted(web.asked) == ["index.json", *(shard(n) for n in range(4))]


READER = """
    import os, sys, time
    from pathlib import Path
    from disttrain.data.source import SourceOptions, open_source
    source = open_source(sys.argv[1], SourceOptions(shard_folder=Path(sys.argv[2])))
    print("open", flush=True)
    data = [source.read(n) for n in range(len(source.records))]
    from disttrain.files import sha256_bytes
    assert [sha256_bytes(one) for one in data] == [r.digest for r in source.records]
    print("read", flush=True)
"""


def reader(web: Web, options: SourceOptions) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            textwrap.dedent(READER),
            web.url("index.json"),
            str(options.shard_folder),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_processes_share_the_folder_and_a_killed_one_blocks_nobody(local, web, options):
    web.faults[shard(0)] = ["trickle"]
    killed = reader(web, options)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "open\n"
    while not web.fetched(shard(0)):
        time.sleep(0.01)
    others = [reader(web, options) for _ in range(2)]
    time.sleep(0.5)
    assert web.fetched(shard(0)) == 1, "they wait for the one that fetches"
    killed.send_signal(signal.SIGKILL)
    killed.wait(10)
    for other in others:
        shown, _ = other.communicate(timeout=30)
        assert shown == "open\nread\n"
        assert other.returncode == 0
    assert [web.fetched(shard(n)) for n in range(4)] == [2, 1, 1, 1]


def test_streams_hold_little(web, tmp_path):
    """A large file passes through in pieces."""
    (tmp_path / "web" / "large.bin").write_bytes(bytes(2**20) * 48)
    largest, total = 0, 0
    with storage.reading(web.url("large.bin")) as handle:
        assert isinstance(handle, io.BufferedReader)
        while piece := handle.read(2**20):
            largest, total = max(largest, len(piece)), total + len(piece)
    assert (largest, total) == (2**20, 48 * 2**20)


def test_a_fork_reads_on(local, web, options):
    """Workers that are forked do not share the connections of their parent."""
    remote = open_source(web.url("index.json"), options)
    remote.read(0)
    child = os.fork()
    if child == 0:
        os._exit(0 if remote.read(3) == local.read(3) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert threading.active_count() > 0
