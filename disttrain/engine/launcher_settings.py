"""What a launcher's own files say about splitting and precision, and whether the config agrees.

`accelerate launch` passes its file's settings on as environment variables, from which Accelerate
would make plugins by itself. Invariant: they are read here once, checked and removed, so that the
config alone decides how a run trains.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from dataclasses import replace

from disttrain.config import ParallelSettings, RunConfig, Strategy
from disttrain.config_file import check_parallel
from disttrain.engine.deepspeed_settings import engine_settings, offload_of, read_settings
from disttrain.errors import ConfigError

ASKED = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")


def settle_parallel(
    config: RunConfig, environment: MutableMapping[str, str] | None = None
) -> RunConfig:
    """The config with `parallel.strategy` decided: its own, the launcher's, or ddp.

    Raises:
        ConfigError: the launcher's file says something else than the config.
    """
    environment = os.environ if environment is None else environment
    asked = _launcher_strategy(environment)
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", config.mixed_precision):
        raise ConfigError(
            f"mixed_precision: {config.mixed_precision}, but the launcher says {precision}; "
            f"launch with --mixed_precision no, or set mixed_precision: {precision}"
        )
    for name, value, usual in [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", config.train.gradient_accumulation_steps, "1"),
        ("ACCELERATE_GRADIENT_CLIPPING", config.optim.max_grad_norm, "none"),
    ]:
        said = environment.get(name, "auto").lower()
        if asked is not None and said not in ("auto", usual) and float(said) != value:
            raise ConfigError(
                f"the launcher's file says {said} for {name}, the config {value}; remove it there"
            )
    for name in ASKED:
        environment.pop(name, None)
    own = config.parallel
    if asked is None:
        settled = replace(own, strategy="ddp" if own.strategy == "auto" else own.strategy)
    elif own.strategy not in ("auto", asked.strategy):
        raise ConfigError(
            f"parallel.strategy: {own.strategy}, but the launcher's file says {asked.strategy}; "
            "launch without it, or remove the key"
        )
    else:
        settled = replace(
            own,
            strategy=asked.strategy,
            offload_optimizer=own.offload_optimizer or asked.offload_optimizer,
            deepspeed_config=own.deepspeed_config or asked.deepspeed_config,
        )
    if settled.deepspeed_config and not settled.offload_optimizer:
        splitting = read_settings(settled.deepspeed_config).get("zero_optimization", {})
        offload = offload_of(splitting, settled.deepspeed_config)
        settled = replace(settled, offload_optimizer=offload)
    config = replace(config, parallel=settled)
    check_parallel(config)
    if settled.deepspeed_config:
        engine_settings(config, settled.strategy)  # contradictions are told before a model loads
    return config


def _launcher_strategy(environment: MutableMapping[str, str]) -> ParallelSettings | None:
    if _is_set(environment, "ACCELERATE_USE_FSDP"):
        if _is_set(environment, "FSDP_OFFLOAD_PARAMS"):
            raise ConfigError("the launcher's file has fsdp_offload_params, which is not supported")
        return ParallelSettings(strategy="fsdp")
    if not _is_set(environment, "ACCELERATE_USE_DEEPSPEED"):
        return None
    path = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    if path and path != "none":
        splitting = read_settings(path).get("zero_optimization", {})
        offload = offload_of(splitting, path)
        stage = splitting.get("stage", 2)
        return ParallelSettings(_strategy(stage), offload, deepspeed_config=path)
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    said = {
        part: {"device": environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{name}_DEVICE", "none")}
        for part, name in [("offload_optimizer", "OPTIMIZER"), ("offload_param", "PARAM")]
    }
    return ParallelSettings(_strategy(stage), offload_of(said, "the launcher's file"))


def _strategy(stage: object) -> Strategy:
    stages: dict[str, Strategy] = {"1": "zero1", "2": "zero2", "3": "zero3"}
    if str(stage) not in stages:
        raise ConfigError(f"the launcher's file asks for ZeRO stage {stage}; use 1, 2 or 3")
    return stages[str(stage)]


def _is_set(environment: MutableMapping[str, str], name: str) -> bool:
    return environment.get(name, "").lower() in ("1", "true", "yes")
