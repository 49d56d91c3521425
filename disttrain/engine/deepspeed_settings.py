"""What DeepSpeed is told: this run's batch, accumulation, clipping and precision, and how to split.

A JSON file of a user's own or of an accelerate launch file may say how to split, not how to train.
Invariant: where such a file says something else than the run's config, the run does not start.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from disttrain.config import RunConfig
from disttrain.errors import ConfigError, DataError
from disttrain.files import read_json

BUCKET = 50_000_000


def engine_settings(config: RunConfig, strategy: str) -> dict[str, Any]:
    """DeepSpeed's configuration for a run.

    Raises:
        ConfigError: `parallel.deepspeed_config` contradicts the run's config.
    """
    where = config.parallel.deepspeed_config
    own = read_settings(where) if where else {}
    half = config.mixed_precision == "bf16"
    training = {
        "train_micro_batch_size_per_gpu": _rows(config),
        "gradient_accumulation_steps": config.train.gradient_accumulation_steps,
        "gradient_clipping": float(config.optim.max_grad_norm),
        # The step is passed over, and the run ends, when a gradient is not finite.
        "bf16": {"enabled": True, "check_grad_overflow": True} if half else {"enabled": False},
        "fp16": {"enabled": False},
    }
    _refuse_contradictions(own, training, where)
    stage, splitting = stage_of(strategy), own.get("zero_optimization", {})
    if splitting.get("stage", stage) != stage:
        raise ConfigError(
            f"parallel.strategy: {strategy}, but {where} says stage {splitting['stage']}; "
            "make them agree"
        )
    own_offload = offload_of(splitting, where)
    if config.parallel.offload_optimizer and "offload_optimizer" in splitting and not own_offload:
        raise ConfigError(
            f"parallel.offload_optimizer: true, but {where} says device none; make them agree"
        )
    rest = {key: value for key, value in own.items() if key not in training and value != "auto"}
    return {
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        # torch's AdamW steps on the processor too; DeepSpeed's own has to be compiled first.
        "zero_force_ds_cpu_optimizer": False,
        **rest,
        **training,
        "zero_optimization": {
            **usual_splitting(stage, config.parallel.offload_optimizer),
            **splitting,
        },
    }


def _refuse_contradictions(own: dict[str, Any], training: dict[str, Any], where: str) -> None:
    for key, value in training.items():
        said = own.get(key, "auto")
        if isinstance(said, dict) and isinstance(value, dict):
            said, value = said.get("enabled", "auto"), value["enabled"]
        if said not in ("auto", value):
            raise ConfigError(
                f"parallel.deepspeed_config: {where} says {key} {said}, the config {value}; "
                'write "auto" there'
            )
    for key in ("optimizer", "scheduler", "train_batch_size"):
        if own.get(key, "auto") != "auto":
            raise ConfigError(
                f"parallel.deepspeed_config: {where} has its own {key}, which the config decides; "
                "remove it there"
            )


def offload_of(splitting: dict[str, Any], where: str) -> bool:
    """Whether a zero_optimization section offloads the optimizer's state.

    Raises:
        ConfigError: it offloads what is not supported.
    """
    device = splitting.get("offload_optimizer", {}).get("device", "none")
    weights = splitting.get("offload_param", {}).get("device", "none")
    if weights != "none" or device not in ("none", "cpu"):
        raise ConfigError(
            f"{where}: offloads weights, or to a disk; only the optimizer may be offloaded, to cpu"
        )
    return device == "cpu"


def usual_splitting(stage: int, offload: bool) -> dict[str, Any]:
    """How a model is split when nothing else is said."""
    return {
        "stage": stage,
        "offload_optimizer": {"device": "cpu" if offload else "none"},
        "overlap_comm": False,
        "contiguous_gradients": True,
        # Numbers that travel at once; DeepSpeed's usual 500 million are 2 GB of float32.
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }


def stage_of(strategy: str) -> int:
    """ZeRO stage of "zero1", "zero2" or "zero3"."""
    return int(strategy.removeprefix("zero"))


def read_settings(path: str) -> dict[str, Any]:
    """A DeepSpeed JSON file.

    Raises:
        ConfigError: missing or not a JSON object.
    """
    try:
        found = read_json(Path(path))
    except (DataError, OSError) as error:
        raise ConfigError(f"parallel.deepspeed_config: {path}: cannot be read ({error})") from error
    if not isinstance(found, dict) or not isinstance(found.get("zero_optimization", {}), dict):
        raise ConfigError(f"parallel.deepspeed_config: {path}: not a DeepSpeed configuration")
    return found


def _rows(config: RunConfig) -> int:
    return config.data.batch_size * (1 if config.prior is None else 2)
