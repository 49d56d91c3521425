"""Tensors on disk: what is read is what was written, or nothing."""

import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from disttrain import files
from disttrain.data import tensor_store
from disttrain.data.tensor_store import TensorStore

MODEL = ("vae", "ab" * 32)


def store_of(folder: Path, dtype: torch.dtype = torch.float32, model=MODEL) -> TensorStore:
    store = TensorStore(folder, "x", model, dtype)
    store.scan()
    return store


def items(count: int = 5, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    draw = np.random.default_rng(0)
    return {
        f"key {i}": torch.from_numpy(draw.normal(size=(3, 2, i + 1))).to(dtype)
        for i in range(count)
    }


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_written_is_read(tmp_path, dtype):
    written = items(dtype=dtype)
    store_of(tmp_path, dtype).write(written)
    store = store_of(tmp_path, dtype)
    for key, value in written.items():
        found = store.read(key)
        assert found is not None
        assert found.dtype == dtype
        assert torch.equal(found, value)
        assert key in store
    assert "other" not in store
    assert store.read("other") is None


def test_files_are_plain_safetensors(tmp_path):
    written = items()
    store_of(tmp_path).write(written)
    found = load_file(only_file(tmp_path))
    assert found.keys() == written.keys()
    assert all(torch.equal(found[key], value) for key, value in written.items())


def test_reading_opens_no_file_for_longer(tmp_path):
    store_of(tmp_path).write(items(300))
    store = store_of(tmp_path)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert all(store.read(f"key {i}") is not None for i in range(300))
    assert before == (len(os.listdir("/proc/self/fd")) if before else 0)


def test_stores_of_other_models_and_types_are_separate(tmp_path, caplog):
    store_of(tmp_path).write(items())
    with caplog.at_level(logging.WARNING):
        assert "key 0" not in store_of(tmp_path, model=("vae", "cd" * 32))
        assert "key 0" not in store_of(tmp_path, model=("text encoder", MODEL[1]))
        assert "key 0" not in store_of(tmp_path, torch.float16)
    assert caplog.text.count("ignored") == 3
    assert "key 0" not in TensorStore(tmp_path, "y", MODEL)
    with pytest.raises(AssertionError):
        store_of(tmp_path).write(items(dtype=torch.float16))


def test_new_and_replaced_files_are_found_at_the_next_scan(tmp_path):
    early = store_of(tmp_path)
    written = items()
    store_of(tmp_path).write(written)
    assert early.read("key 1") is None
    early.scan()
    assert early.read("key 1") is not None
    path = only_file(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[:-200] + bytes(200))
    assert early.read("key 4") is None
    assert "key 4" not in early
    early.scan()
    assert early.read("key 4") is None, "it is the same damaged file"
    time.sleep(0.01)
    store_of(tmp_path).write(written)
    early.scan()
    found = early.read("key 4")
    assert found is not None
    assert torch.equal(found, written["key 4"])


def test_a_second_copy_serves_for_a_damaged_one(tmp_path):
    written = items()
    store_of(tmp_path).write(written)
    path = only_file(tmp_path)
    store_of(tmp_path).write({"key 0": written["key 0"]})
    path.write_bytes(path.read_bytes()[:-400] + bytes(400))
    store = store_of(tmp_path)
    found = store.read("key 0")
    assert found is not None
    assert torch.equal(found, written["key 0"])


def test_a_file_that_shrinks_or_goes_is_no_crash(tmp_path):
    store_of(tmp_path).write({"a": torch.ones(2000, 10), "b": torch.zeros(2000, 10)})
    path = only_file(tmp_path)
    store = store_of(tmp_path)
    assert store.read("b") is not None
    with path.open("r+b") as handle:
        handle.truncate(5000)
    assert store.read("b") is None
    path.unlink()
    assert store.read("a") is None


def test_work_is_written_in_pieces_and_kept_when_it_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_store, "ITEMS_PER_FILE", 4)

    def some():
        for number, item in enumerate(items(10).items()):
            if number == 7:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        store_of(tmp_path).write_all(some())
    assert len(list(tmp_path.iterdir())) == 2
    store = store_of(tmp_path)
    assert [f"key {i}" in store for i in range(10)] == [True] * 7 + [False] * 3
    assert store.write_all(items(10).items()) == 10
    assert store_of(tmp_path / "none").write_all([]) == 0
    assert not (tmp_path / "none").exists()
    monkeypatch.setattr(tensor_store, "SECONDS_PER_FILE", 0.0)
    store_of(tmp_path / "slow").write_all(items(3).items())
    assert len(list((tmp_path / "slow").iterdir())) == 3


def test_threads_read_at_once(tmp_path):
    written = {f"{i}": torch.full((64,), float(i)) for i in range(200)}
    store_of(tmp_path).write_all(written.items())
    store = store_of(tmp_path)
    wrong: list[str] = []

    def read_all() -> None:
        for key, value in written.items():
            found = store.read(key)
            if found is None or not torch.equal(found, value):
                wrong.append(key)

    threads = [threading.Thread(target=read_all) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert wrong == []


# Damage


def made(header: Any, values: bytes = bytes(64), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + values


def header_of(**changes: Any) -> dict[str, Any]:
    value = torch.zeros(4)
    digest = files.sha256_bytes(b"torch.float32 (4,) " + value.numpy().tobytes())
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes
    return {
        "__metadata__": {MODEL[0]: MODEL[1], "digests": json.dumps({"a": digest})},
        "a": entry,
    }


def test_the_made_file_is_read(tmp_path):
    (tmp_path / "x-0.safetensors").write_bytes(made(header_of()))
    found = store_of(tmp_path).read("a")
    assert found is not None
    assert torch.equal(found, torch.zeros(4))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        made(header_of(), length=2**63),
        made(header_of(), length=2**30),
        made(header_of(), length=0),
        made(b"[]"),
        made(b"{"),
        made(b"\xff{}"),
        made(b"[" * 200_000),
        made({}),
        made({"__metadata__": [], "a": {}}),
        made(header_of() | {"__metadata__": {MODEL[0]: MODEL[1]}}),
        made(header_of() | {"__metadata__": {MODEL[0]: MODEL[1], "digests": "[" * 100_000}}),
        made(header_of() | {"__metadata__": {MODEL[0]: MODEL[1], "digests": "3"}}),
        made(header_of() | {"a": None}),
        made(header_of(dtype="F16")),
        made(header_of(dtype=None)),
        made(header_of(shape=None)),
        made(header_of(shape=[4.0])),
        made(header_of(shape=[True, 4])),
        made(header_of(shape=[-1, -4])),
        made(header_of(shape=[2, 2])),
        made(header_of(shape=[1] * 100 + [4])),
        made(header_of(shape=[0], data_offsets=[0, 0])),
        made(header_of(shape=[2**60], data_offsets=[0, 2**62])),
        made(header_of(shape=[2**63, 0], data_offsets=[0, 0])),
        made(header_of(data_offsets=[0, 20])),
        made(header_of(data_offsets=[64, 80])),
        made(header_of(data_offsets=[4, 20]), values=b"\1" * 64),
        made(header_of(data_offsets=[16, 0])),
        made(header_of(data_offsets=[0, 16, 32])),
        made(header_of(data_offsets="ab")),
        made(header_of(), values=bytes(15)),
        made(header_of(), values=b"\1" * 64),
    ],
)
def test_made_up_files_are_ignored(tmp_path, caplog, data):
    (tmp_path / "x-0.safetensors").write_bytes(data)
    with caplog.at_level(logging.WARNING):
        start = time.monotonic()
        assert store_of(tmp_path).read("a") is None
        assert time.monotonic() - start < 2
    absent = data == made(header_of() | {"a": None})  # a header without the item is no damage
    assert ("x-0.safetensors: damaged" in caplog.text) is not absent
    store_of(tmp_path).write(items())
    assert store_of(tmp_path).read("key 3") is not None, "others are not held up by it"


def test_what_is_no_file_is_ignored(tmp_path):
    (tmp_path / "x-folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "x-pipe.safetensors")
    (tmp_path / "x-link.safetensors").symlink_to(tmp_path / "nowhere")
    store_of(tmp_path).write(items())
    assert store_of(tmp_path).read("key 3") is not None


def test_random_damage_gives_the_right_tensor_or_none(tmp_path):
    written = items()
    store_of(tmp_path).write(written)
    path = only_file(tmp_path)
    original = path.read_bytes()
    draw = np.random.default_rng(1)
    outcomes = {True: 0, False: 0}
    for _ in range(1000):
        data = bytearray(original)
        reach = len(data) if draw.random() < 0.5 else 900
        for place in draw.integers(0, reach, draw.choice([1, 3, 20])):
            data[place] = draw.integers(256)
        path.write_bytes(data if draw.random() < 0.9 else data[: draw.integers(len(data))])
        store = store_of(tmp_path)
        for key, value in written.items():
            found = store.read(key)
            outcomes[found is None] += 1
            assert found is None or torch.equal(found, value)
    assert min(outcomes.values()) > 300
