"""A script of slurm/ with its options filled in, as pure functions of text.

Between `slurm_job.py`, which knows the run, and SLURM. The scripts are those that a person gives to
sbatch by hand; a rendered one has other #SBATCH lines, its environment and its arguments, and is
otherwise the same. Invariant: what was put in arrives in the job as it was, whatever blanks,
quotes or dollar signs it holds; what SLURM could not read as it was is refused.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

from disttrain.errors import UserError

_MARK = "#SBATCH "


def read_script(name: str) -> str:
    """A script of slurm/, such as train.sbatch, installed with the package or beside it."""
    package = resources.files("disttrain")
    beside = Path(str(package)).parent / "slurm"
    for folder in (package / "slurm_scripts", beside):
        found = folder / name
        if found.is_file():
            return found.read_text(encoding="utf-8")
    raise UserError(f"slurm/{name} is not installed; install disttrain again")


def render(
    script: str,
    changes: Mapping[str, str | None],
    environment: Mapping[str, str],
    arguments: Sequence[str],
    note: str,
) -> str:
    """The script with its own #SBATCH lines changed, its environment and its arguments inside.

    Args:
        changes: SLURM's long options without dashes; None for those that take no value.
        note: a line that says where it comes from.
    """
    options: dict[str, str | None] = {}
    before: list[str] = []
    after: list[str] = []
    for line in script.splitlines():
        if line.startswith(_MARK):
            name, separator, value = line.removeprefix(f"{_MARK}--").strip().partition("=")
            options[name] = value if separator else None
        else:
            (after if options else before).append(line)
    options.update({name: _directive(name, value) for name, value in changes.items()})
    shown = [
        f"{_MARK}--{name}" + ("" if value is None else f"={value}")
        for name, value in options.items()
    ]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    inside = ["", f"# {note}", *exports, shlex.join(["set", "--", *arguments])]
    return "\n".join([*before, *shown, *inside, *after]) + "\n"


def _directive(name: str, value: str | None) -> str | None:
    """A value as it stands in a line for sbatch, which knows quotes, but no line breaks."""
    if value is None:
        return None
    if not value.isprintable() or "\\" in value:
        raise UserError(f"--{name}: {value!r} cannot stand in a line for sbatch; use plain text")
    return shlex.quote(value)


def log_pattern(folder: Path, task: str) -> str:
    """A log's place for sbatch, in which a percent sign begins a field such as %j."""
    return str(folder).replace("%", "%%") + f"/job-{task}.log"


def split_option(text: str) -> tuple[str, str | None]:
    """(name, value) of an option for sbatch that is handed on as it is."""
    name, separator, value = text.partition("=")
    if not name.startswith("--") or len(name) < 3 or any(part.isspace() for part in name):
        raise UserError(f"--sbatch-option: {text!r} is no long option; write --name=value")
    return name[2:], value if separator else None
