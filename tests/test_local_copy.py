"""The base model's copy on the machine's own disk: made once, whole, of the files as they are."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, clean_environment

from disttrain.models import local_copy
from disttrain.models.base import load_base
from disttrain.models.folder import weight_files
from disttrain.models.local_copy import near

WEIGHTS = [weight_files(part) for part in ("unet", "text_encoder", "vae")]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DISTTRAIN_LOCAL_CACHE", str(tmp_path / "local"))
    return tmp_path / "local"


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "shared/model"))


def copies(cache: Path) -> list[Path]:
    return sorted(path for path in (cache / "base-models").glob("*/*") if path.is_dir())


def let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the processes that used copies had ended: what follows is not kept in use."""
    monkeypatch.setattr(local_copy, "keep_in_use", os.close)


def test_without_the_variable_nothing_is_copied(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DISTTRAIN_LOCAL_CACHE", raising=False)
    assert near(model, WEIGHTS) == model
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]


def test_a_folder_is_loaded_from_its_copy_and_is_the_same_model(model: Path, cache: Path) -> None:
    said: list[str] = []
    copied = load_base(str(model), say=said.append)
    (content,) = copies(cache)
    assert said == [f"copying base model {model} ({said[0].split('(')[1]}"]
    assert str(content) in said[0]
    shutil.move(model / "vae", model / "vae-away")  # what is read later comes from the copy
    assert copied.load_vae() is not None
    shutil.move(model / "vae-away", model / "vae")
    os.environ.pop("DISTTRAIN_LOCAL_CACHE")
    original = load_base(str(model))
    assert (copied.name, copied.digest) == (original.name, original.digest)
    for name, tensor in original.unet.state_dict().items():
        assert torch.equal(copied.unet.state_dict()[name], tensor)


def test_a_second_process_finds_it(model: Path, cache: Path) -> None:
    said: list[str] = []
    first = near(model, WEIGHTS, said.append)
    stamp = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    assert near(model, WEIGHTS, said.append) == first
    assert len(said) == 1
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == stamp


def test_only_what_is_loaded_is_copied(model: Path, cache: Path) -> None:
    (model / "unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"other")
    (model / "unet/diffusion_pytorch_model.bin").write_bytes(b"other")
    (model / "picture.png").write_bytes(b"other")
    names = {str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()}
    copy = near(model, WEIGHTS)
    found = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    assert names - found == {
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "picture.png",
    }


def test_a_single_file_is_copied(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    path.write_bytes(b"weights")
    copy = near(path, [])
    assert copy != path
    assert (copy.name, copy.read_bytes()) == (path.name, b"weights")


def test_changed_files_are_copied_anew_and_the_old_copy_leaves(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go(monkeypatch)
    first = near(model, WEIGHTS)
    os.utime(model / "unet/config.json", (1, 1))
    second = near(model, WEIGHTS)
    assert second != first
    assert copies(cache) == [second.parent]


def test_an_old_copy_in_use_stays(model: Path, cache: Path) -> None:
    first = near(model, WEIGHTS)
    os.utime(model / "unet/config.json", (1, 1))
    second = near(model, WEIGHTS)
    assert copies(cache) == sorted([first.parent, second.parent])


@pytest.mark.parametrize("damage", ["unlink", "cut"])
def test_a_copy_that_was_tidied_away_in_part_is_made_again(
    damage: str, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go(monkeypatch)
    copy = near(model, WEIGHTS)
    victim = copy / "unet/config.json"
    if damage == "unlink":
        victim.unlink()
    else:
        victim.write_bytes(b"")
    assert near(model, WEIGHTS) == copy
    assert victim.read_bytes() == (model / "unet/config.json").read_bytes()


def test_without_room_the_original_is_loaded_with_a_warning(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_copy, "SPARE", 2**60)
    said: list[str] = []
    assert near(model, WEIGHTS, warn=said.append) == model
    (line,) = said
    assert line.startswith("DISTTRAIN_LOCAL_CACHE: ")
    assert "bytes free" in line
    assert copies(cache) == []


def test_a_cache_that_cannot_be_written_is_a_warning(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DISTTRAIN_LOCAL_CACHE", str(tmp_path / "file"))
    said: list[str] = []
    assert near(model, WEIGHTS, warn=said.append) == model
    assert len(said) == 1


def test_a_folder_without_weights_is_left_to_the_loader(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert near(tmp_path / "empty", WEIGHTS) == tmp_path / "empty"
    assert not cache.exists()


def test_a_lock_that_another_holds_too_long_is_a_warning(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from disttrain.files import exclusively

    let_go(monkeypatch)
    monkeypatch.setattr(local_copy, "LONGEST_WAIT", 0.3)
    lock = near(model, WEIGHTS).parent.parent / ".lock"
    said: list[str] = []
    with exclusively(lock):
        assert near(model, WEIGHTS, warn=said.append) == model
    assert "another process has held" in said[0]


COPY = """
import sys
from pathlib import Path
from disttrain.models import local_copy
from disttrain.models.folder import weight_files
made = []
copyfile = local_copy.shutil.copyfile
local_copy.shutil.copyfile = lambda a, b: (made.append(a), copyfile(a, b))
weights = [weight_files(part) for part in ("unet", "text_encoder", "vae")]
print(local_copy.near(Path(sys.argv[1]), weights), bool(made))
"""


def test_processes_of_one_machine_make_one_copy(model: Path, cache: Path) -> None:
    running = [
        subprocess.Popen(
            [sys.executable, "-c", COPY, str(model)],
            cwd=ROOT,
            env=clean_environment(DISTTRAIN_LOCAL_CACHE=str(cache)),
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    said = [process.communicate(timeout=120)[0].split() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len({place for place, _ in said}) == 1
    assert sorted(made for _, made in said) == ["False", "False", "True"]
    assert len(copies(cache)) == 1
