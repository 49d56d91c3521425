"""`disttrain slurm`: a config becomes a job whose files stay beside its run.

Below `commands.py`, over `slurm_script.py`. Each submission has a folder of its own,
OUTPUT_DIR/NAME.jobs/STAMP, with the script, the settings it runs and the version that submitted it.
Invariant: a job depends on nothing that a person may edit after submitting it, except the code and
the pictures.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from disttrain import __version__
from disttrain.cluster.commands import Options
from disttrain.cluster.slurm_script import log_pattern, read_script, render, split_option
from disttrain.cluster.snapshot import Snapshot, take_snapshot
from disttrain.errors import EXIT_DONE, UserError
from disttrain.files import remove_folder, write_json, write_text

JOB_FILE = "job.json"
VARIABLES = (
    *("DISTTRAIN_ENV", "DISTTRAIN_NPROC", "DISTTRAIN_LAUNCH", "DISTTRAIN_MAX_REQUEUES"),
    *("DISTTRAIN_INTERFACE", "DISTTRAIN_LOCAL_CACHE"),
)
PASSED_ON = (
    *("nodes", "gpus_per_node", "cpus_per_task", "time", "partition", "account", "qos", "mem"),
    "constraint",
)


@dataclass(frozen=True)
class Job:
    """A job as it will be submitted."""

    folder: Path
    """Where its files lie."""
    script: str
    """What SLURM runs."""
    snapshot: Snapshot
    """What the script runs."""
    task: str
    """Field of the log's name: %j, or of an array %A_%a."""


def jobs_folder(run: Path) -> Path:
    """Where the submissions of a run lie."""
    return run.parent / f"{run.name}.jobs"


def submit(options: Options) -> int:
    """Submit a config, or show or test what would be submitted."""
    check_options(options)
    job = make_job(options, os.environ, datetime.now(timezone.utc))
    if options.dry_run:
        print(job.script, end="")
        return EXIT_DONE
    if options.test_only:
        print(sbatch("--test-only", script=job.script) or "sbatch accepts the job")
        return EXIT_DONE
    find_program("sbatch")
    write_text(job.folder / "job.sbatch", job.script)
    for name, text in job.snapshot.files.items():
        write_text(job.folder / name, text)
    write_text(job.folder / "revision.txt", revision(Path(__file__).parents[2]))
    try:
        number = sbatch("--parsable", str(job.folder / "job.sbatch")).partition(";")[0]
    except UserError:
        remove_folder(job.folder)
        with suppress(OSError):  # other submissions may be in it
            job.folder.parent.rmdir()
        raise
    write_json(job.folder / JOB_FILE, {"job": number, "log": _log(job, number)})
    print(f"submitted job {number}")
    print(f"log {_log(job, number)}")
    return EXIT_DONE


def _log(job: Job, number: str) -> str:
    task = job.task.replace("%j", number).replace("%A", number).replace("%a", "*")
    return f"{job.folder}/job-{task}.log"


def refuse_beside(options: Options, asked: str) -> None:
    """Refuse what was given beside --status or --cancel: they ask of a job that exists."""
    both = options.status is not None and options.cancel is not None
    if both or options.config is not None or options.dry_run or options.test_only:
        raise UserError(f"{asked}: takes a run folder alone; remove the rest")


def check_options(options: Options) -> None:
    """Refuse numbers and combinations that cannot be."""
    if options.config is None:
        raise UserError("slurm: give CONFIG, or --status RUN, or --cancel RUN")
    for name in ("nodes", "gpus_per_node", "processes_per_node", "cpus_per_task", "signal_seconds"):
        value = getattr(options, name)
        if value is not None and value < (0 if name == "gpus_per_node" else 1):
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1")
    if options.dry_run and options.test_only:
        raise UserError("--test-only: given beside --dry-run; remove one of the two")
    if options.array is not None and options.fleet is None:
        raise UserError("--array: only a fleet has tasks; give --fleet MANIFEST too")
    if options.array is not None and options.array < 1:
        raise UserError("--array: must be at least 1")
    gpus, processes = options.gpus_per_node, options.processes_per_node
    if gpus and processes and processes > gpus:
        raise UserError(f"--processes-per-node: {processes} for {gpus} GPUs; each needs its own")
    given = {name.replace("_", "-") for name in PASSED_ON if getattr(options, name) is not None}
    for name, _ in map(split_option, options.sbatch_option):
        if name in given | {"output", "error", "open-mode", "signal", "array", "job-name", "wrap"}:
            raise UserError(f"--sbatch-option: --{name} is set by disttrain slurm; remove it")


def make_job(options: Options, inherited: Mapping[str, str], now: datetime) -> Job:
    """The job of these options, with nothing written yet."""
    snapshot = take_snapshot(options)
    jobs = jobs_folder(snapshot.run)
    stamp, number = now.strftime("%Y%m%d-%H%M%S"), 1
    folder = jobs / stamp
    while folder.exists():
        number += 1
        folder = jobs / f"{stamp}-{number}"
    fleet = options.fleet is not None
    task = "%A_%a" if fleet else "%j"
    name = "fleet.sbatch" if fleet else "train.sbatch"
    changes: dict[str, str | None] = {
        "job-name": snapshot.run.name,
        "output": log_pattern(folder, task),
        **_directives(options),
    }
    script = render(
        read_script(name),
        changes,
        job_environment(options, inherited),
        [str(folder / word) for word in snapshot.words],
        f"Written by disttrain {__version__} from slurm/{name}.",
    )
    return Job(folder, script, snapshot, task)


def _directives(options: Options) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PASSED_ON:
        value = getattr(options, name)
        if value is not None:
            found[name.replace("_", "-")] = str(value)
    if options.signal_seconds is not None:
        found["signal"] = f"B:USR1@{options.signal_seconds}"
    if options.fleet is not None:
        workers = options.processes_per_node or options.gpus_per_node or 1
        found["ntasks-per-node"] = str(workers)
        found["array"] = f"0-{(options.array or 1) - 1}"
    found.update(map(split_option, options.sbatch_option))
    return found


def job_environment(options: Options, inherited: Mapping[str, str]) -> dict[str, str]:
    """Variables that the script reads: those set where it was submitted, and those of options."""
    found = {name: inherited[name] for name in VARIABLES if inherited.get(name)}
    activate = Path(sys.prefix) / "bin" / "activate"
    if options.env is not None:
        found["DISTTRAIN_ENV"] = options.env
    elif "DISTTRAIN_ENV" not in found and activate.is_file():
        found["DISTTRAIN_ENV"] = f"source {shlex.quote(str(activate))}"
    if options.processes_per_node is not None:
        found["DISTTRAIN_NPROC"] = str(options.processes_per_node)
    if options.launcher != "torchrun":
        words = f"{found.get('DISTTRAIN_LAUNCH', '')} --launcher {options.launcher}"
        found["DISTTRAIN_LAUNCH"] = words.strip()
    return found


def find_program(name: str) -> str:
    """Path of a program of SLURM."""
    path = shutil.which(name)
    if path is None:
        raise UserError(
            f"{name} is not installed on this machine; run this where SLURM's commands are, "
            "usually a login node"
        )
    return path


def sbatch(*words: str, script: str | None = None) -> str:
    """What sbatch answers; a script may be given on its standard input."""
    done = subprocess.run(
        [find_program("sbatch"), *words], input=script, capture_output=True, text=True, check=False
    )
    answer = " ".join(f"{done.stdout} {done.stderr}".split())
    if done.returncode:
        raise UserError(f"sbatch refused the job: {answer}")
    return done.stdout.strip() or answer


def revision(source: Path) -> str:
    """Which disttrain this is: version, commit and whether files differ from it."""
    lines = [f"disttrain {__version__}"]
    top = _git(source, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != source.resolve():  # some other project's repository
        return "\n".join([*lines, "commit unknown (not a git checkout)"]) + "\n"
    lines.append(f"commit {_git(source, 'rev-parse', 'HEAD')}")
    changed = _git(source, "status", "--porcelain") or ""
    lines.append(f"dirty, {len(changed.splitlines())} files differ" if changed else "clean")
    return "\n".join([*lines, *changed.splitlines()]) + "\n"


def _git(folder: Path, *words: str) -> str | None:
    program = shutil.which("git")
    if program is None:
        return None
    done = subprocess.run(
        [program, "-C", str(folder), *words], capture_output=True, text=True, check=False
    )
    return None if done.returncode else done.stdout.rstrip("\n")
