"""Jobs on the lab: submitted, waited for, and asked how they stand."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conftest import clean_environment
from lab import ROOT, Lab, LabError, wait_until

TRAIN, FLEET = ROOT / "slurm/train.sbatch", ROOT / "slurm/fleet.sbatch"
BIN = Path(sys.prefix) / "bin"
GONE = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"}


def job_environment(**extra: str) -> dict[str, str]:
    """What a person's shell holds at `sbatch`; without the lab's own traces of other checks."""
    environment = clean_environment(**extra)
    environment["DISTTRAIN_ENV"] = f"export PATH={shlex.quote(str(BIN))}:$PATH"
    return environment | extra


@dataclass
class Job:
    """One job, or one task of an array as ID_TASK."""

    lab: Lab
    number: str
    log: Path

    @property
    def text(self) -> str:
        """All that it said so far, over all its starts."""
        return self.log.read_text(errors="replace") if self.log.is_file() else ""

    def task(self, number: int) -> Job:
        """One task of an array."""
        name = f"{self.number}_{number}"
        return Job(self.lab, name, Path(str(self.log).replace("%a", str(number))))

    def field(self, name: str) -> str:
        """A field of `scontrol show job`, such as JobState or Restarts."""
        shown = self.lab.run("scontrol", "-o", "show", "job", self.number).stdout
        found = re.search(rf"\b{name}=(\S*)", shown)
        if found is None:
            raise LabError(f"job {self.number} has no {name}: {shown}")
        return found[1]

    @property
    def state(self) -> str:
        """RUNNING, PENDING, COMPLETED, ..."""
        return self.field("JobState")

    @property
    def restarts(self) -> int:
        """How often SLURM started it again."""
        return int(self.field("Restarts"))

    @property
    def exit_code(self) -> int:
        """Of the script."""
        return int(self.field("ExitCode").split(":")[0])

    def wait_state(self, states: set[str], seconds: float) -> None:
        """Until it is in one of these states.

        Raises:
            LabError: with the end of its log.
        """
        try:
            what = f"job {self.number} {'/'.join(sorted(states))}"
            wait_until(what, lambda: self.state in states, seconds, every=0.2)
        except LabError as error:
            raise LabError(f"{error}; it is {self.state}\n{self.text[-6000:]}") from error

    def wait_text(self, pattern: str, seconds: float) -> None:
        """Until its log holds a match."""
        try:
            wait_until(pattern, lambda: bool(re.search(pattern, self.text)), seconds)
        except LabError as error:
            raise LabError(f"{error}; it is {self.state}\n{self.text[-6000:]}") from error

    def finish(self, seconds: float = 120) -> None:
        """Until it completed; any other end is an error."""
        self.wait_state(GONE, seconds)
        assert self.state == "COMPLETED", (
            f"{self.state}, code {self.exit_code}\n{self.text[-6000:]}"
        )


def submit(
    lab: Lab,
    script: Path,
    *words: str | Path,
    options: Sequence[str] = (),
    **environment: str,
) -> Job:
    """`sbatch` as a person would, from the repository root."""
    log = "task-%A_%a.log" if script == FLEET else "job-%j.log"
    done = lab.run(
        *("sbatch", "--parsable", f"--output={lab.share / log}"),
        *options,
        script,
        *words,
        env=job_environment(**environment),
    )
    if done.returncode:
        raise LabError(f"sbatch: {done.stderr.strip()}")
    number = done.stdout.strip().split(";")[0]
    return Job(lab, number, lab.share / log.replace("%j", number).replace("%A", number))


def preempt(lab: Lab, hosts: int, seconds: int = 2) -> Job:
    """Another's job of the urgent partition, which takes whole hosts."""
    words = ["--parsable", "-p", "urgent", f"-N{hosts}", "--ntasks-per-node=1", "--exclusive"]
    wrap = ["-t1", f"--output={lab.share}/urgent-%j.log", "--wrap", f"sleep {seconds}"]
    done = lab.run("sbatch", *words, *wrap)
    assert done.returncode == 0, done.stderr
    return Job(lab, done.stdout.strip(), lab.share / f"urgent-{done.stdout.strip()}.log")


def training_processes(lab: Lab, host: str, name: str) -> dict[int, int]:
    """Rank -> process number (as the host counts) of a run's training processes on a host."""
    script = (
        'for p in /proc/[0-9]*; do n=${p#/proc/}; words=$(tr "\\0" " " <"$p/cmdline") || continue; '
        'case "$words" in *"-m disttrain train"*"name=$1"*) ;; *) continue ;; esac; '
        'case "$words" in *" -m torch"* | *" -m accelerate"*) continue ;; esac; '
        'rank=$(tr "\\0" "\\n" <"$p/environ" | sed -n "s/^RANK=//p"); '
        '[ -n "$rank" ] && echo "$rank $n"; done 2>/dev/null'
    )
    shown = lab.run("bash", "-c", script, "ranks", name, host=host).stdout
    pairs = [line.split() for line in shown.splitlines()]
    return {int(rank): int(process) for rank, process in pairs}


def host_of_rank(lab: Lab, rank: int, name: str) -> str:
    """Where a rank of a run works."""
    for host in lab.names:
        if rank in training_processes(lab, host, name):
            return host
    raise LabError(f"no host runs rank {rank} of {name}")


def stand_in(lab: Lab, name: str, script: str) -> tuple[Path, str]:
    """Lines of bash to be started as `disttrain`, where only what is around it matters.

    Returns:
        A folder, $SEEN in the script, and the DISTTRAIN_ENV with which jobs find it.
    """
    folder = lab.share / name
    (folder / "bin").mkdir(parents=True)
    program = folder / "bin/disttrain"
    program.write_text(f"#!/usr/bin/env bash\n{script}")
    program.chmod(0o755)
    words = [shlex.quote(str(path)) for path in (folder / "bin", folder)]
    return folder, f"export PATH={words[0]}:$PATH SEEN={words[1]}"


def work(seconds: int, each: str = ":") -> str:
    """Lines of bash that take so long, and hear signals meanwhile."""
    return f"for ((i = 0; i < {10 * seconds}; i++)); do sleep 0.1; {each}; done\n"
