"""Trainings by four processes on two hosts, started by the job script, against one process."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from jobs import BIN, TRAIN, Job, job_environment, submit
from lab import Lab
from trees import config_file, same_run, world_of

from disttrain.config import RunConfig

METHODS = ("lora", "textual_inversion", "dreambooth")
LAUNCHERS = {"lora": "", "textual_inversion": "--launcher accelerate", "dreambooth": ""}
HOSTS = ["--nodes=2", "--cpus-per-task=2"]
WORD = "one 'two' \"three\" $four `five`"

needs_strategies = pytest.mark.skipif(
    "parallel" not in {field.name for field in dataclasses.fields(RunConfig)},
    reason="this version has no strategies",
)


@pytest.fixture(scope="module")
def worlds(lab: Lab) -> Callable[[str], Path]:
    """Method -> the run folder that four processes on two hosts made; each is trained once."""
    made: dict[str, Path] = {}

    def run(method: str) -> Path:
        if method not in made:
            config = config_file(method, lab.share / "worlds")
            words = [config, f"train.sample_negative_prompt={WORD}"]
            environment = {"DISTTRAIN_NPROC": "2", "DISTTRAIN_LAUNCH": LAUNCHERS[method]}
            submit(lab, TRAIN, *words, options=HOSTS, **environment).finish(180)
            made[method] = lab.share / "worlds" / method
        return made[method]

    return run


@pytest.mark.parametrize("method", METHODS)
def test_four_processes_on_two_hosts_equal_one(
    method: str, worlds: Callable[[str], Path], reference: Callable[..., Path]
) -> None:
    import yaml

    run = worlds(method)
    assert world_of(run) == 4
    same_run(run, reference(method))
    kept = yaml.safe_load((run / "config.yaml").read_text())
    assert kept["train"]["sample_negative_prompt"] == WORD


def disttrain(lab: Lab, *words: str | Path) -> tuple[int, str]:
    """A command of disttrain on the login host; its exit code and all that it says."""
    done = lab.run(BIN / "disttrain", *words, env=job_environment())
    return done.returncode, done.stdout + done.stderr


def test_the_command_submits_the_same_job(lab: Lab, reference: Callable[..., Path]) -> None:
    folder = lab.share / "submitted"
    config = config_file("lora", folder)
    place = ["--nodes", "2", "--processes-per-node", "2", "--cpus-per-task", "2"]
    environment = job_environment()["DISTTRAIN_ENV"]
    command = ["slurm", config, *place, "--env", environment, "--launcher", "accelerate"]
    code, said = disttrain(lab, *command, "--test-only")
    assert code == 0, said
    assert not list(folder.glob("*.jobs")), "--test-only leaves nothing behind"
    code, said = disttrain(lab, *command, "--nodes", "9", "--test-only")
    assert code == 2, said
    assert "disttrain: " in said
    code, said = disttrain(lab, *command)
    assert code == 0, said
    (log,) = [Path(word) for word in said.split() if word.endswith(".log")]
    number = log.stem.removeprefix("job-")
    job = Job(lab, number, log)
    config.unlink()  # the job runs its own copy
    job.finish(180)
    assert world_of(folder / "lora") == 4
    same_run(folder / "lora", reference("lora"))


STRATEGIES = {
    "zero2": "--deepspeed zero2",
    "zero3": "--deepspeed zero3",
    "zero2-offload": "--deepspeed zero2 --offload",
    "fsdp": "--fsdp",
}
PROCESSES = {"zero2": 2}
"""On each host, where it is not one: a second costs seconds, and shows nothing new."""


@pytest.fixture(scope="module")
def spread(lab: Lab) -> Callable[[str], Path]:
    """Strategy -> the run folder of DreamBooth on two hosts; each is trained once."""
    made: dict[str, Path] = {}

    def run(strategy: str) -> Path:
        if strategy not in made:
            folder = lab.share / strategy
            config = config_file("dreambooth", folder)
            environment = {
                "DISTTRAIN_NPROC": str(PROCESSES.get(strategy, 1)),
                "DISTTRAIN_LAUNCH": STRATEGIES[strategy],
            }
            submit(lab, TRAIN, config, options=HOSTS, **environment).finish(240)
            made[strategy] = folder / "dreambooth"
        return made[strategy]

    return run


@needs_strategies
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_model_spread_over_hosts_learns_the_same(
    strategy: str, spread: Callable[[str], Path], worlds: Callable[[str], Path]
) -> None:
    run = spread(strategy)
    environment = json.loads((run / "environment.json").read_text())
    assert environment["world_size"] == 2 * PROCESSES.get(strategy, 1)
    assert environment["strategy"] == strategy.partition("-")[0]
    same_run(run, worlds("dreambooth"))


@needs_strategies
def test_a_spread_run_goes_on_with_fewer_processes(
    lab: Lab, spread: Callable[[str], Path], reference: Callable[..., Path]
) -> None:
    run = spread("zero2")
    config = run.parent / "dreambooth.yaml"
    environment = {"DISTTRAIN_LAUNCH": STRATEGIES["zero2"]}
    job = submit(lab, TRAIN, config, "train.max_steps=9", options=HOSTS, **environment)
    job.finish(180)
    assert "going on from step 6" in job.text
    assert world_of(run) == 2
    same_run(run, reference("dreambooth", 9))


@needs_strategies
def test_stock_diffusers_draws_with_a_spread_result(spread: Callable[[str], Path]) -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    model = spread("zero3") / "subjects/fox/model"
    assert json.loads((model / "model_index.json").read_text())["_class_name"]
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    picture = pipeline(
        "a photo of sks fox",
        height=64,
        width=64,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert len(set(picture.convert("L").tobytes())) > 20
