"""What preflight concludes from facts; and the disk that a run is certain to need."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import small_config, train_here

from disttrain import schema
from disttrain.config import RunConfig
from disttrain.config_file import parse_config
from disttrain.engine.disk_need import FLOOR, needed_bytes
from disttrain.engine.preflight import plain_size, problems, warnings
from disttrain.engine.survey import (
    RankFacts,
    code_digest,
    free_bytes,
    nearest_folder,
    saying_if_it_waits,
)
from disttrain.errors import UserError

VERSIONS = {"python": "3.11.7", "disttrain": "0.1", "torch": "2.13.0", "numpy": "2.4"}


def facts(rank: int, host: str, **other: Any) -> RankFacts:
    usual = RankFacts(
        host=host,
        rank=rank,
        local_rank=0,
        settings={"command": "train", "optim.learning_rate": 0.0001},
        versions=VERSIONS,
        code="a" * 64,
        device="cuda",
        device_name="H",
        device_id=f"gpu-{rank}",
        interface="",
        output_dir="/shared/runs",
        free={"/shared": 2**40},
        shared=True,
        writable=True,
        sum_is_right=True,
        clock=1000.0,
    )
    return replace(usual, **other)


def pair(**other: Any) -> list[RankFacts]:
    return [facts(0, "node1"), replace(facts(1, "node2"), **other)]


def test_those_that_agree_are_let_through_in_silence() -> None:
    assert problems(pair()) == []
    assert warnings(pair()) == []


@pytest.mark.parametrize(
    ("other", "line"),
    [
        (
            {"settings": {"command": "train", "optim.learning_rate": 0.0002}},
            "node2 (rank 1) has other settings than node1: optim.learning_rate 0.0002 "
            "(node1: 0.0001); start every process with the same config",
        ),
        (
            {"versions": {**VERSIONS, "torch": "2.12.0"}},
            "node2 (rank 1) has other versions than node1: torch 2.12.0 (node1: 2.13.0); "
            "install the same on every host",
        ),
        (
            {"code": "b" * 64},
            "node2 (rank 1) runs other code of disttrain than node1: digest bbbbbbbbbbbb, not "
            "aaaaaaaaaaaa; install the same revision on every host",
        ),
        (
            {"shared": False},
            "node2 (rank 1) does not see what node1 writes into output_dir /shared/runs; put "
            "output_dir on a file system that all hosts share, under the same path",
        ),
        (
            {"writable": False},
            "node2 (rank 1) may not write into output_dir /shared/runs; change its permissions",
        ),
        (
            {"device": "cpu", "device_id": "", "device_name": "x86_64"},
            "node2 (rank 1) computes on cpu, node1 on cuda; give every process a GPU or none",
        ),
        (
            {"free": {"/shared": 10 * 2**20}},
            "node2: /shared has 10 MiB free, at least 64 MiB are needed",
        ),
        (
            {"sum_is_right": False},
            "node2 (rank 1) got a wrong sum over all processes; the network or a GPU of theirs is "
            "defective, leave these hosts out",
        ),
        (
            {"host": "node1", "device_id": "gpu-0"},
            "ranks 0, 1 on node1 share one GPU (H); start one process for each GPU",
        ),
    ],
)
def test_each_difference_is_one_line_with_its_host(other: dict[str, Any], line: str) -> None:
    assert problems(pair(**other)) == [line]


def test_processes_without_gpus_share_none() -> None:
    assert problems([facts(rank, "node1", device="cpu", device_id="") for rank in range(3)]) == []


def test_ranks_of_one_host_that_differ_alike_are_one_line() -> None:
    other = {"settings": {"command": "train", "optim.learning_rate": 1.0}}
    several = [facts(0, "node1"), *(facts(rank, "node2", **other) for rank in (1, 2, 3))]
    (line,) = problems(several)
    assert line.startswith("node2 (ranks 1, 2, 3) have other settings than node1: ")


def test_many_keys_and_long_values_stay_one_short_line() -> None:
    many = {"command": "train", **{f"data.key{i}": "x" * 500 for i in range(9)}}
    (line,) = problems(pair(settings=many))
    assert "and 7 more" in line
    assert len(line) < 500
    assert "(node1: nothing)" in line


def test_deepspeed_must_be_the_same_only_where_it_is_used() -> None:
    def settings(zero: bool) -> dict[str, Any]:
        return {"parallel.strategy": "zero2" if zero else "ddp"}

    for zero in (False, True):
        versions = {**VERSIONS, "deepspeed": "0.19.8"}
        both = [
            facts(0, "node1", settings=settings(zero), versions=versions),
            facts(1, "node2", settings=settings(zero)),
        ]
        assert len(problems(both)) == zero
        assert len(warnings(both)) == (not zero)


@pytest.mark.parametrize(
    ("other", "fragment"),
    [
        ({"versions": {**VERSIONS, "python": "3.11.9"}}, "python 3.11.9 (node1: 3.11.7)"),
        ({"versions": {**VERSIONS, "numpy": "2.5"}}, "numpy 2.5 (node1: 2.4)"),
        ({"device_name": "A"}, "node2 (rank 1) has a A, node1 (rank 0) a H"),
        ({"clock": 1100.0}, "the clocks of node2 and node1 are 100 s apart"),
    ],
)
def test_what_may_differ_is_a_warning(other: dict[str, Any], fragment: str) -> None:
    (line,) = warnings(pair(**other))
    assert fragment in line
    assert problems(pair(**other)) == []


def test_whoever_waits_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    import time

    with saying_if_it_waits(3, seconds=0.05):
        time.sleep(0.3)
    assert "rank 3] preflight: still waiting for the other processes" in capsys.readouterr().err
    with saying_if_it_waits(3, seconds=0.2):
        pass
    time.sleep(0.3)
    assert capsys.readouterr().err == ""


# Disk.


def model_run(folder: Path, base: Path, **train: Any) -> dict[str, Any]:
    tree = small_config("dreambooth", folder, **train)
    return {**tree, "base_model": str(base)}


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_need_is_close_to_and_never_above_what_a_run_writes(
    tiny_folder: Path, tmp_path: Path
) -> None:
    tree = model_run(tmp_path, tiny_folder, max_steps=2, checkpoint_every=1, keep_checkpoints=2)
    config = parse_config(tree)
    # While the last checkpoint is written there is one more than is kept in the end.
    one = needed_bytes(replace_keep(config, 1), False) - needed_bytes(config, False)
    need = needed_bytes(config, fresh=False) - FLOOR + one
    assert one < 0
    run = train_here(tree)
    assert 0.5 * used(run) < need <= used(run)
    assert needed_bytes(config, fresh=False) == FLOOR
    assert needed_bytes(config, fresh=True) - FLOOR + one == need


def replace_keep(config: RunConfig, keep: int) -> RunConfig:
    return replace(config, train=replace(config.train, keep_checkpoints=keep))


def test_checkpoints_that_are_there_need_no_room_again(tiny_folder: Path, tmp_path: Path) -> None:
    tree = model_run(tmp_path, tiny_folder, max_steps=9, checkpoint_every=1, keep_checkpoints=3)
    config = parse_config(tree)
    begun = needed_bytes(config, fresh=False)
    (config.folder / "subjects/fox/checkpoints/step-00000001").mkdir(parents=True)
    assert FLOOR < needed_bytes(config, fresh=False) < begun
    assert needed_bytes(config, fresh=True) == begun


def test_what_cannot_be_known_is_a_floor(tmp_path: Path) -> None:
    assert needed_bytes(parse_config(small_config("lora", tmp_path)), False) == FLOOR
    tree = model_run(tmp_path, tmp_path / "absent.safetensors")
    assert needed_bytes(parse_config(tree), False) == FLOOR
    (tmp_path / "absent.safetensors").write_bytes(b"not one")
    assert needed_bytes(parse_config(tree), False) == FLOOR


def test_a_full_disk_is_refused_before_anything_is_written(
    tiny_folder: Path, tmp_path: Path
) -> None:
    most = {"max_steps": 10**9, "checkpoint_every": 1, "keep_checkpoints": 10**8}
    tree = model_run(tmp_path / "out", tiny_folder, **most)
    with pytest.raises(UserError, match=rf"preflight: .*: {tmp_path} has .* free, .* needs"):
        train_here(tree)
    assert list(tmp_path.iterdir()) == []


def test_sizes_folders_and_digests(tmp_path: Path) -> None:
    assert plain_size(64 * 2**20) == "64 MiB"
    assert plain_size(3 * 2**30) == "3.0 GiB"
    assert nearest_folder(tmp_path / "a/b") == tmp_path
    assert free_bytes(tmp_path) == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    assert free_bytes(tmp_path / "absent") is None
    assert code_digest() == code_digest()
    assert "parallel.strategy" in schema.flatten(
        schema.to_mapping(parse_config(small_config("lora", tmp_path)))
    )
