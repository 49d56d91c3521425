"""Which placement a run gets: from its config, a launcher's file, or a DeepSpeed JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, disttrain, small_config, train_here, write_config

from disttrain.config_file import parse_config
from disttrain.engine.deepspeed_settings import engine_settings, usual_splitting
from disttrain.engine.launcher_settings import settle_parallel
from disttrain.errors import ConfigError


def config_of(method: str = "dreambooth", **parallel: Any) -> Any:
    tree = small_config(method, Path("runs"))
    tree["parallel"] = parallel
    return parse_config(tree)


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3", "fsdp"])
@pytest.mark.parametrize("method", ["lora", "textual_inversion"])
def test_methods_that_train_a_few_tensors_say_why_not(method: str, strategy: str) -> None:
    with pytest.raises(ConfigError, match="trains a few MB, so ddp is faster") as refusal:
        config_of(method, strategy=strategy)
    assert ("parallel.force: true" in str(refusal.value)) == (strategy == "fsdp")
    with pytest.raises(ConfigError, match=r"parallel\.force"):
        config_of("dreambooth", strategy=strategy, force=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixed_precision": "fp16"}, "mixed_precision: fp16 is not for zero2; use bf16"),
        ({"optim.ema_decay": 0.9}, "optim.ema_decay: not with zero2"),
        ({"parallel.strategy": "fsdp", "parallel.offload_optimizer": True}, "not for fsdp"),
        ({"parallel.strategy": "ddp", "parallel.deepspeed_config": "a.json"}, "not for ddp"),
        ({"parallel.strategy": "zero4"}, "parallel.strategy"),
    ],
)
def test_contradictions_are_refused(change: dict[str, Any], message: str) -> None:
    from disttrain import schema

    tree = small_config("dreambooth", Path("runs")) | {"parallel": {"strategy": "zero2"}}
    words = [f"{key}={json.dumps(value)}" for key, value in change.items()]
    with pytest.raises(ConfigError, match=message):
        parse_config(schema.apply_overrides(tree, words))


def test_the_launchers_file_decides_where_the_config_does_not() -> None:
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    assert settle_parallel(config_of(), asked).parallel.strategy == "fsdp"
    assert asked == {"FSDP_VERSION": "2"}, "else Accelerate makes a plugin of its own"
    assert settle_parallel(config_of(), {}).parallel.strategy == "ddp"
    assert settle_parallel(config_of(strategy="zero3"), {}).parallel.strategy == "zero3"
    file = str(ROOT / "launch/deepspeed/zero3_offload.json")
    asked = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": file}
    settled = settle_parallel(config_of(), dict(asked)).parallel
    assert (settled.strategy, settled.deepspeed_config) == ("zero3", file)
    plain = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}
    plain["ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"] = "cpu"
    settled = settle_parallel(config_of(), plain).parallel
    assert (settled.strategy, settled.offload_optimizer) == ("zero1", True)
    with pytest.raises(ConfigError, match="trains a few MB"):
        settle_parallel(config_of("lora"), dict(asked))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "zero2, but the launcher's file says fsdp"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision: no, but the launcher says fp16"),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"},
            "asks for ZeRO stage 0",
        ),
        (
            {
                "ACCELERATE_USE_DEEPSPEED": "true",
                "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
                "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
            },
            "says 4 for ACCELERATE_GRADIENT_ACCUMULATION_STEPS, the config 1",
        ),
        (
            {
                "ACCELERATE_USE_DEEPSPEED": "true",
                "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
                "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme",
            },
            "only the optimizer may be offloaded",
        ),
    ],
)
def test_a_launcher_that_contradicts_the_config_is_refused(
    environment: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        settle_parallel(config_of(strategy="zero2"), environment)


@pytest.mark.parametrize("path", sorted((ROOT / "launch/deepspeed").glob("*.json")), ids=str)
def test_deepspeed_files_say_how_to_split_and_nothing_else(path: Path) -> None:
    stage = int(path.stem[4])
    config = config_of(strategy=f"zero{stage}", deepspeed_config=str(path))
    own = json.loads(path.read_text())
    assert own["zero_optimization"] == usual_splitting(stage, "offload" in path.stem)
    settings = engine_settings(config, f"zero{stage}")
    assert settings["gradient_clipping"] == config.optim.max_grad_norm
    assert settings["zero_optimization"] == own["zero_optimization"]
    assert "auto" not in json.dumps(settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradient_accumulation_steps": 3}, "says gradient_accumulation_steps 3, the config 1"),
        ({"gradient_clipping": 5.0}, "says gradient_clipping 5.0, the config 1.0"),
        ({"train_micro_batch_size_per_gpu": 99}, "says train_micro_batch_size_per_gpu 99"),
        ({"bf16": {"enabled": True}}, "says bf16 True, the config False"),
        ({"fp16": {"enabled": True}}, "says fp16 True, the config False"),
        ({"optimizer": {"type": "Adam"}}, "has its own optimizer"),
        ({"zero_optimization": {"stage": 3}}, "zero2, but .* says stage 3"),
        ({"zero_optimization": 3}, "not a DeepSpeed configuration"),
    ],
)
def test_a_deepspeed_file_that_contradicts_the_config_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, **change}))
    with pytest.raises(ConfigError, match=message):
        settle_parallel(config_of(strategy="zero2", deepspeed_config=str(path)), {})


def test_one_process_has_nothing_to_split(tmp_path: Path) -> None:
    tree = small_config("dreambooth", tmp_path, max_steps=1)
    tree["parallel"] = {"strategy": "zero3"}
    done = disttrain("train", write_config(tree, tmp_path / "c.yaml"))
    assert done.returncode == 0, done.stderr
    assert "parallel.strategy: zero3 has nothing to split on one process" in done.stdout
    told = json.loads((tmp_path / "dreambooth/environment.json").read_text())
    assert told["strategy"] == "ddp"


def test_the_optimizer_of_one_process_may_be_offloaded(tmp_path: Path) -> None:
    plain = train_here(small_config("dreambooth", tmp_path / "a", max_steps=3))
    tree = small_config("dreambooth", tmp_path / "b", max_steps=3)
    tree["parallel"] = {"strategy": "zero2", "offload_optimizer": True}
    done = disttrain("train", write_config(tree, tmp_path / "c.yaml"))
    assert done.returncode == 0, done.stderr[-2000:]
    left, right = (
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (plain, tmp_path / "b/dreambooth")
    )
    assert left == pytest.approx(right, rel=1e-5)


@pytest.mark.parametrize("own", [{"offload_optimizer": True}, {"deepspeed_config": "a.json"}])
def test_workers_of_a_fleet_split_nothing(own: dict[str, Any]) -> None:
    from disttrain.engine.fleet import settled

    with pytest.raises(ConfigError, match="workers of a fleet split nothing; remove it"):
        settled([config_of(strategy="zero2", **own)])
    assert settled([config_of(strategy="zero2")])


def test_offload_of_a_file_counts_and_is_not_contradicted(tmp_path: Path) -> None:
    offloads = str(ROOT / "launch/deepspeed/zero2_offload.json")
    settled = settle_parallel(config_of(strategy="zero2", deepspeed_config=offloads), {})
    assert settled.parallel.offload_optimizer
    keeps = str(ROOT / "launch/deepspeed/zero2.json")
    config = config_of(strategy="zero2", deepspeed_config=keeps, offload_optimizer=True)
    with pytest.raises(ConfigError, match="device none; make them agree"):
        settle_parallel(config, {})
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"zero_optimization": {"offload_param": {"device": "cpu"}}}))
    with pytest.raises(ConfigError, match="only the optimizer may be offloaded"):
        settle_parallel(config_of(strategy="zero3", deepspeed_config=str(path)), {})
