"""What ends jobs before their time: preemption, time limits, people, lost hosts and cables.

Every disturbed run must go on from its newest checkpoint and end as if it had been left alone. The
disturbances are real; only training is held up (SIGSTOP) where one must be waited for.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from jobs import TRAIN, Job, host_of_rank, preempt, submit, training_processes
from lab import Lab, wait_until
from trees import config_file, same_run, steps_taken, wait_step

STEPS, EVERY = 100, 10
"""About ten seconds of training; a checkpoint each second."""
METHOD = "textual_inversion"


def start(lab: Lab, name: str, *options: str, **environment: str) -> tuple[Job, Path]:
    """One process on each of two hosts; the job and the run folder."""
    folder = lab.share / "faults"
    config = config_file(METHOD, folder, max_steps=STEPS, checkpoint_every=EVERY)
    job = submit(lab, TRAIN, config, f"name={name}", options=["--nodes=2", *options], **environment)
    return job, folder / name


def wait_training(job: Job, run: Path, step: int = EVERY + 2) -> None:
    """Until the run has a checkpoint and steps beyond it."""
    wait_step(run, step, 90, lambda: job.text)


def resumed_at(job: Job) -> list[int]:
    """The steps from which its starts went on."""
    return [int(step) for step in re.findall(r"going on from step ([0-9]+) ", job.text)]


def hold(lab: Lab, run: Path, number: signal.Signals) -> None:
    """Stop or continue every training process of a run."""
    for host in lab.names:
        for process in training_processes(lab, host, run.name).values():
            lab.run("kill", f"-{number.name.removeprefix('SIG')}", str(process), host=host)


def limit_time(job: Job, soon: int) -> None:
    """Let the job's time be over at the first full minute that is more than `soon` seconds away."""
    began = datetime.fromisoformat(job.field("StartTime"))
    elapsed = max(0.0, (datetime.now() - began).total_seconds())
    minutes = int((elapsed + soon) // 60) + 1
    done = job.lab.run("scontrol", "update", f"JobId={job.number}", f"TimeLimit={minutes}")
    assert done.returncode == 0, done.stderr


def test_preempted_after_a_cable_was_out(whole_lab: Lab, reference: Callable[..., Path]) -> None:
    """A cable that is out for 20 s is survived (or costs a restart); then others need the hosts."""
    lab = whole_lab
    job, run = start(lab, "preempted", "--nodelist=node1,node2")
    wait_training(job, run)
    lab.cut("node2")
    lab.run("sleep", "20")
    still = steps_taken(run)
    assert still < STEPS, "the run ended before the cable was out"
    lab.mend("node2")
    lab.wait_known(["node1", "node2"])
    wait_step(run, still + 5, 120, lambda: job.text)
    before = job.restarts
    other = preempt(lab, hosts=3)
    other.finish(90)
    job.finish(180)
    assert job.restarts == before + 1, job.text
    assert "told to stop; the training processes save" in job.text
    assert all(step > EVERY for step in resumed_at(job)), job.text
    assert len(resumed_at(job)) == job.restarts
    same_run(run, reference(METHOD, STEPS))


def test_two_jobs_lose_a_host_without_a_word(
    whole_lab: Lab, reference: Callable[..., Path]
) -> None:
    """The power of node2 is cut: rank zero of one job works there, and the other rank of another.
    SLURM starts both again once it is back."""
    lab = whole_lab
    jobs = {name: start(lab, name, f"--nodelist={hosts}") for name, hosts in PAIRS.items()}
    for job, run in jobs.values():
        wait_training(job, run)
    ranks = {name: host_of_rank(lab, 0, name) for name in PAIRS}
    assert list(ranks.values()).count("node2") == 1, f"rank zero: {ranks}"
    lab.off("node2")
    for job, run in jobs.values():
        assert steps_taken(run) < STEPS, "the run ended before the power was cut"
        wait_until(f"{run.name} is requeued", lambda job=job: job.restarts == 1, 120)
    lab.on("node2")
    for job, run in jobs.values():
        job.finish(180)
        assert job.restarts == 1, job.text
        assert resumed_at(job), job.text
        assert resumed_at(job)[0] >= EVERY
        same_run(run, reference(METHOD, STEPS))


PAIRS = {"lost-first": "node1,node2", "lost-second": "node2,node3"}


def test_people_decide_limits_hold_and_time_runs_out(
    whole_lab: Lab, reference: Callable[..., Path]
) -> None:
    """One run through four jobs: cancelled by a person; requeued at its time limit, and only as
    often as allowed; and brought to its end."""
    lab = whole_lab
    job, run = start(lab, "patient")
    wait_training(job, run)
    lab.run("scancel", job.number)
    job.wait_state({"CANCELLED"}, 60)
    stopped = steps_taken(run)
    assert EVERY < stopped < STEPS
    lab.run("sleep", "10")  # a requeued job waits 5 s
    assert (job.state, job.restarts) == ("CANCELLED", 0), job.text
    assert "not requeued" in job.text

    limits = ["--time=60", "--signal=B:USR1@10"]
    job, run = start(lab, "patient", *limits, DISTTRAIN_MAX_REQUEUES="1")
    wait_training(job, run, stopped + 2)
    assert resumed_at(job) == [stopped], "a cancelled run must have saved where it stopped"
    hold(lab, run, signal.SIGSTOP)
    limit_time(job, soon=15)
    job.wait_text("told to stop; the training processes save", 100)
    hold(lab, run, signal.SIGCONT)
    wait_until("the requeue", lambda: job.restarts == 1, 60)
    limit_time(job, soon=3600)
    held = steps_taken(run)
    assert held < STEPS, "the run ended before its time was out"
    wait_step(run, held + 2, 90, lambda: job.text)
    assert resumed_at(job) == [stopped, held]
    lab.run("scancel", "--signal=USR1", "--batch", job.number)
    job.wait_state({"FAILED", "COMPLETED"}, 60)
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 75, 1), job.text
    assert "requeued 1 times already" in job.text

    job, run = start(lab, "patient")
    job.finish(120)
    same_run(run, reference(METHOD, STEPS))
