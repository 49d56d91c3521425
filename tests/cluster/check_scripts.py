"""The job scripts as text, and what reaches the training through sbatch and srun."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import FLEET, TRAIN, preempt, stand_in, submit, work
from lab import HERE, ROOT, Lab, wait_until

SHELL = sorted(
    path
    for folder in (ROOT / "slurm", ROOT / "launch", HERE)
    for path in folder.rglob("*")
    if path.suffix in (".sh", ".sbatch")
)
SHARED = re.compile(r"# --- the same in .*# --- end of the part that is the same ---", re.DOTALL)
NOTE_WORDS = """
words=("$SLURM_NODEID" "${SLURM_CPUS_PER_TASK:-}" "$@")
printf '%s\\0' "${words[@]}" >"$SEEN/$(hostname)"
"""
AWKWARD = ["a=b c", "b='q' \"r\"", "c=$HOME $(hostname) `id`", "d=back\\slash *", "e=", "f=ü\nline"]


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_shellcheck_is_content(path: Path) -> None:
    program = shutil.which("shellcheck")
    assert program, "shellcheck not found; apt-get install shellcheck"
    done = subprocess.run([program, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_both_scripts_stop_and_start_again_alike() -> None:
    train, fleet = (SHARED.search(path.read_text()) for path in (TRAIN, FLEET))
    assert train is not None
    assert fleet is not None
    assert train[0] == fleet[0]


def test_words_arrive_unchanged_and_ranks_are_the_nodes(lab: Lab) -> None:
    folder, environment = stand_in(lab, "words", NOTE_WORDS)
    options = ["--nodes=2", "--cpus-per-task=2"]
    chosen = {"DISTTRAIN_ENV": environment, "DISTTRAIN_NPROC": "3"}
    extra = {"DISTTRAIN_LAUNCH": "--launcher accelerate --deepspeed zero2"}
    job = submit(lab, TRAIN, "c.yaml", *AWKWARD, options=options, **chosen, **extra)
    job.finish(60)
    port = 20000 + int(job.number) * 7 % 10000
    for rank, host in enumerate(("node1", "node2")):
        seen = (folder / host).read_text().split("\0")[:-1]
        assert seen[:5] == [str(rank), "2", "launch", "c.yaml", AWKWARD[0]]
        assert seen[4 : 4 + len(AWKWARD)] == AWKWARD
        launch = ["--launcher", "accelerate", "--deepspeed", "zero2", "--nproc", "3"]
        place = ["--rendezvous", f"node1:{port}", "--nodes", "2", "--node-rank", str(rank)]
        assert seen[4 + len(AWKWARD) :] == [*launch, *place]


def test_a_mistake_on_one_host_is_the_jobs_exit_code(lab: Lab) -> None:
    """srun ends the other host with TERM, which then says 75; the job must not start again."""
    script = "trap 'exit 75' TERM\n[[ $(hostname) = node2 ]] && exit 2\n"
    _, environment = stand_in(lab, "mistake", script + work(20))
    job = submit(lab, TRAIN, "c.yaml", options=["--nodes=2"], DISTTRAIN_ENV=environment)
    job.wait_state({"FAILED", "COMPLETED"}, 40)
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 2, 0), job.text


def test_each_task_of_an_array_is_stopped_and_started_for_itself(lab: Lab) -> None:
    """The last task has the number of the array: signals and requeues by number would hit all."""
    script = (
        'name=$SEEN/$SLURM_ARRAY_TASK_ID-$RANK-$WORLD_SIZE-$LOCAL_RANK\necho start >>"$name"\n'
        "trap 'echo stopped >>\"$name\"; exit 75' USR1\n" + work(8) + 'echo done >>"$name"\n'
    )
    folder, environment = stand_in(lab, "array", script)
    options = ["--array=0-1", "--nodes=1", "--ntasks-per-node=2"]
    env = {"DISTTRAIN_ENV": environment, "DISTTRAIN_NPROC": "2"}
    job = submit(lab, FLEET, "m.csv", "c.yaml", options=options, **env)
    first, last = (job.task(number) for number in (0, 1))
    for task in (first, last):
        task.wait_state({"RUNNING"}, 20)
    last.wait_text("start 0", 10)
    lab.run("sleep", "1")
    lab.run("scancel", "--signal=USR1", "--batch", last.number)
    for task in (first, last):
        task.finish(60)
    assert (first.restarts, last.restarts) == (0, 1)
    for task, said in ((0, "start\ndone\n"), (1, "start\nstopped\nstart\ndone\n")):
        for rank in (0, 1):
            assert (folder / f"{task}-{rank}-2-{rank}").read_text() == said


@pytest.fixture(scope="module")
def usual_lab(lab: Lab) -> Iterator[Lab]:
    """Two hosts with what most clusters have: no USR1 at preemption."""
    with Lab(nodes=2, notice=False, folder=lab.folder / "usual") as started:
        yield started


def test_preempted_where_only_the_processes_are_told(usual_lab: Lab) -> None:
    """They get TERM; the script gets nothing, and must requeue because of how they ended."""
    script = "trap 'exit 75' TERM\n[[ $SLURM_RESTART_COUNT = 1 ]] && exit 0\n"
    _, environment = stand_in(usual_lab, "told", script + work(60))
    job = submit(usual_lab, TRAIN, "c.yaml", options=["--nodes=2"], DISTTRAIN_ENV=environment)
    job.wait_text("start 0", 20)
    usual_lab.run("sleep", "2")
    preempt(usual_lab, hosts=2, seconds=1).finish(60)
    job.finish(60)
    assert job.restarts == 1
    assert "it was stopped; requeueing" in job.text


def test_a_host_that_is_lost_before_slurm_knows(usual_lab: Lab) -> None:
    """Processes on the other host fail first. That is no fault of the training: srun stays until
    SLURM notices too, and requeues."""
    script = "[[ $SLURM_RESTART_COUNT = 1 ]] && exit 0\n"
    script += work(60, "[[ -e $SEEN/lost ]] && exit 1")
    folder, environment = stand_in(usual_lab, "lost", script)
    job = submit(usual_lab, TRAIN, "c.yaml", options=["--nodes=2"], DISTTRAIN_ENV=environment)
    job.wait_text("start 0", 20)
    usual_lab.run("sleep", "2")
    usual_lab.off("node2")
    (folder / "lost").touch()
    wait_until("the requeue", lambda: job.restarts == 1, 90)
    assert "exit code 101" in job.text
    usual_lab.on("node2")
    job.finish(90)


def test_a_failure_with_every_host_there_is_one(usual_lab: Lab) -> None:
    _, environment = stand_in(
        usual_lab, "fails", "[[ $(hostname) = node2 ]] && exit 1\n" + work(20)
    )
    job = submit(usual_lab, TRAIN, "c.yaml", options=["--nodes=2"], DISTTRAIN_ENV=environment)
    job.wait_state({"FAILED", "COMPLETED"}, 60)
    assert (job.state, job.restarts) == ("FAILED", 0), job.text
