"""How the newest job of a run stands, and ending it.

Below `commands.py`; reads what `slurm_job.py` left beside the run. Invariant: asks SLURM and the
run folder, changes neither but for `cancel`.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from disttrain.cluster.slurm_job import JOB_FILE, find_program, jobs_folder
from disttrain.errors import EXIT_DONE, UserError
from disttrain.files import read_json

FIELDS = ("JobState", "Reason", "Restarts", "RunTime", "TimeLimit", "NodeList", "ExitCode")


def newest_job(run: Path) -> tuple[str, str]:
    """(number, log) of the job that was submitted last for a run."""
    found = sorted(jobs_folder(run).glob(f"*/{JOB_FILE}"))
    if not found:
        raise UserError(f"{run}: no job was submitted for it; disttrain slurm CONFIG submits one")
    value = read_json(found[-1])
    number, log = (value.get("job"), value.get("log")) if isinstance(value, dict) else (None, None)
    if not isinstance(number, str) or not number.isdecimal() or not isinstance(log, str):
        raise UserError(f"{found[-1]}: names no job; remove it, or submit the run again")
    return number, log


def status(run: Path) -> int:
    """Print how the newest job stands, then the run itself."""
    number, log = newest_job(run)
    for line in job_lines(number):
        print(line)
    print(f"log {log}")
    for line in progress_lines(run):
        print(line)
    return EXIT_DONE


def cancel(run: Path) -> int:
    """End the newest job of a run."""
    number, _ = newest_job(run)
    _, error = _ask("scancel", number)
    if error:
        raise UserError(f"job {number} was not cancelled: {error}")
    print(f"cancelled job {number}")
    return EXIT_DONE


def job_lines(number: str) -> list[str]:
    """A line for the job, or for each task of an array.

    The controller forgets a job some minutes after its end; accounting, where there is any,
    remembers it.
    """
    answer, error = _ask("scontrol", "--oneliner", "show", "job", number)
    if not error:
        return [_described(line) for line in answer.splitlines() if line.strip()]
    asked = ("--noheader", "--parsable2", "--jobs", number, "--format", "JobID,State,ExitCode")
    for words in (("--allocations", *asked), ("--completion", *asked)):
        answer, failed = _ask("sacct", *words, needed=False)
        if answer.strip() and not failed:
            rows = [line.split("|") for line in answer.splitlines()]
            return [f"job {row[0]}: {row[1]}, exit code {row[2]}" for row in rows]
    return [f"job {number}: SLURM no longer knows it ({error})"]


def _described(line: str) -> str:
    """One job of `scontrol --oneliner show job`."""
    values = dict(word.split("=", 1) for word in line.split() if "=" in word)
    name = values.get("JobId", "")
    if "ArrayJobId" in values and "ArrayTaskId" in values:
        name = f"{values['ArrayJobId']}_{values['ArrayTaskId']}"
    shown = {field: values[field] for field in FIELDS if values.get(field) not in (None, "(null)")}
    state = shown.pop("JobState", "state unknown")
    if shown.get("Reason") == "None":
        del shown["Reason"]
    return f"job {name}: {state}, " + ", ".join(f"{key} {value}" for key, value in shown.items())


def progress_lines(run: Path) -> list[str]:
    """Finished subjects of a run."""
    path = run / "progress.json"
    if not path.is_file():
        return [f"{run}: no subject is finished yet"] if run.is_dir() else [f"{run}: not begun yet"]
    value = read_json(path)
    finished = value.get("finished") if isinstance(value, dict) else None
    if not isinstance(finished, dict):
        raise UserError(f"{path}: not a progress file; submit the run again")
    return [f"{name}: finished at step {steps}" for name, steps in finished.items()]


def _ask(program: str, *words: str, needed: bool = True) -> tuple[str, str]:
    """(answer, error in one line) of a program of SLURM."""
    try:
        path = find_program(program)
    except UserError:
        if needed:
            raise
        return "", f"{program} is not installed"
    done = subprocess.run([path, *words], capture_output=True, text=True, check=False)
    error = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
    return done.stdout, error if done.returncode else ""
