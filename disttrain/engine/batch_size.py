"""How many pictures an optimizer step holds, and how they are cut over processes.

Between the config and the mesh. Invariant: a run keeps the number it began with on any number of
processes, so that its order of samples and its learning rate stay what they were.
"""

from __future__ import annotations

from dataclasses import replace

from disttrain import schema
from disttrain.config import RunConfig
from disttrain.engine.run_folder import RunFolder
from disttrain.errors import ConfigError


def settle_batch(config: RunConfig, world: int, fresh: bool = False) -> RunConfig:
    """The config with `data.global_batch_size` filled in and the other two fitting it.

    The size comes from the config, else from the run folder that is gone on with, else it is
    processes x batch_size x gradient_accumulation_steps. If the three do not give it, batch_size
    becomes the largest divisor of a process's share that is not above what was asked for.

    Args:
        fresh: the run starts over: what its folder says does not count.

    Raises:
        ConfigError: the size cannot be split over `world` processes.
    """
    batch, accumulation = config.data.batch_size, config.train.gradient_accumulation_steps
    total = config.data.global_batch_size
    if total is None and not fresh:
        total = _begun_with(config)
    if total is None:
        total = world * batch * accumulation
    if world * batch * accumulation != total:
        if total % world:
            worlds = ", ".join(str(n) for n in range(1, total + 1) if total % n == 0)
            raise ConfigError(
                f"data.global_batch_size: {total} pictures cannot be split over {world} processes; "
                f"use {worlds}"
            )
        share = total // world
        batch = max(size for size in range(1, min(batch, share) + 1) if share % size == 0)
        accumulation = share // batch
    return replace(
        config,
        data=replace(config.data, batch_size=batch, global_batch_size=total),
        train=replace(config.train, gradient_accumulation_steps=accumulation),
    )


def _begun_with(config: RunConfig) -> int | None:
    """The size that the run in the config's folder was begun with."""
    path = RunFolder(config.folder).config
    if not path.is_file():
        return None
    return schema.build(RunConfig, schema.read_mapping(path)).data.global_batch_size
