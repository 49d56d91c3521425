"""How many pictures a step holds, and how they are cut over processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import small_config

from disttrain.config import RunConfig
from disttrain.config_file import parse_config
from disttrain.engine.batch_size import settle_batch
from disttrain.engine.run_folder import RunFolder, check_same_run, write_config
from disttrain.errors import ConfigError


def config_of(
    folder: Path, batch: int, accumulation: int = 1, total: int | None = None
) -> RunConfig:
    tree = small_config("lora", folder, gradient_accumulation_steps=accumulation)
    tree["data"] |= {"batch_size": batch, "global_batch_size": total}
    return parse_config(tree)


def cut(config: RunConfig) -> tuple[int | None, int, int]:
    data = config.data
    return data.global_batch_size, data.batch_size, config.train.gradient_accumulation_steps


@pytest.mark.parametrize(
    ("world", "asked", "expected"),
    [
        (1, (4, 1, None), (4, 4, 1)),
        (3, (4, 2, None), (24, 4, 2)),
        (1, (3, 1, 12), (12, 3, 4)),
        (4, (3, 1, 12), (12, 3, 1)),
        (2, (3, 1, 12), (12, 3, 2)),
        (3, (3, 1, 12), (12, 2, 2)),  # 4 a process: 3 does not divide it
        (12, (3, 1, 12), (12, 1, 1)),
        (1, (64, 1, 12), (12, 12, 1)),
        (1, (5, 1, 7), (7, 1, 7)),
    ],
)
def test_a_step_is_cut_over_processes(
    tmp_path: Path,
    world: int,
    asked: tuple[int, int, int | None],
    expected: tuple[int, int, int],
) -> None:
    assert cut(settle_batch(config_of(tmp_path, *asked), world)) == expected


def test_a_world_that_does_not_divide_is_refused_with_those_that_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        settle_batch(config_of(tmp_path, 3, total=12), 5)
    text = "12 pictures cannot be split over 5 processes; use 1, 2, 3, 4, 6, 12"
    assert str(caught.value) == f"data.global_batch_size: {text}"


def test_a_run_keeps_the_size_it_began_with(tmp_path: Path) -> None:
    begun = settle_batch(config_of(tmp_path, 3), 4)
    folder = RunFolder(begun.folder)
    folder.path.mkdir(parents=True)
    write_config(folder, begun)
    for world, expected in [(4, (12, 3, 1)), (2, (12, 3, 2)), (1, (12, 3, 4)), (3, (12, 2, 2))]:
        again = settle_batch(config_of(tmp_path, 3), world)
        assert cut(again) == expected
        check_same_run(folder, again)
    with pytest.raises(ConfigError, match="use 1, 2, 3, 4, 6, 12"):
        settle_batch(config_of(tmp_path, 3), 5)
    assert cut(settle_batch(config_of(tmp_path, 3), 5, fresh=True)) == (15, 3, 1)


def test_another_size_is_another_run(tmp_path: Path) -> None:
    begun = settle_batch(config_of(tmp_path, 3), 4)
    folder = RunFolder(begun.folder)
    folder.path.mkdir(parents=True)
    write_config(folder, begun)
    other = settle_batch(config_of(tmp_path, 3, total=6), 1)
    with pytest.raises(ConfigError, match=r"data.global_batch_size \(12 -> 6\)"):
        check_same_run(folder, other)
