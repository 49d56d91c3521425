"""The options of `disttrain launch` and `disttrain slurm`, and what both say of a run.

Below `cli.py`. Imported for `--help`, so nothing heavy is imported here outside functions.
Invariant: a config is checked, and options that contradict each other are refused, before anything
is started or written.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from disttrain.errors import UserError

STRATEGIES = ("zero1", "zero2", "zero3")
Options = argparse.Namespace
"""What a person typed."""
LAUNCHERS = ("torchrun", "accelerate")


def add_launch(parser: argparse.ArgumentParser) -> None:
    """The options of `disttrain launch`."""
    _add_config(parser)
    add_world(parser)
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="processes here; default: GPUs, or 1"
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines, default 1")
    parser.add_argument(
        "--node-rank", type=int, metavar="R", help="which of them this is: 0, 1, ..."
    )
    parser.add_argument(
        "--rendezvous", metavar="HOST:PORT", help="the machine of rank 0, and a free port on it"
    )
    parser.add_argument(
        "--max-restarts", type=int, default=0, metavar="N", help="starts after a death, default 0"
    )
    parser.add_argument(
        "--join-timeout",
        type=int,
        metavar="S",
        help="seconds to wait for other machines, default 300; given, also for a name or host that "
        "is not there yet",
    )
    parser.add_argument("--fresh", action="store_true", help="start over in a new folder NAME-2")
    parser.add_argument(
        "--dry-run", action="store_true", help="print environment and commands, start nothing"
    )


def add_slurm(parser: argparse.ArgumentParser) -> None:
    """The options of `disttrain slurm`."""
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG", help="YAML file")
    _add_overrides(parser)
    add_world(parser)
    add = parser.add_argument
    add("--array", type=int, metavar="N", help="tasks that share a fleet, default 1")
    add("--nodes", type=int, metavar="N", help="nodes of the job, or of each task; default 1")
    add("--gpus-per-node", type=int, metavar="N", help="GPUs on each node")
    add("--processes-per-node", type=int, metavar="N", help="default: GPUs, or 1")
    add("--cpus-per-task", type=int, metavar="N", help="cores of a node; of a fleet's worker")
    add("--time", metavar="T", help="time limit, such as 12:00:00")
    add("--partition", metavar="NAME", help="where to run")
    add("--account", metavar="NAME", help="who pays")
    add("--qos", metavar="NAME", help="quality of service")
    add("--mem", metavar="SIZE", help="memory of a node, such as 64G")
    add("--constraint", metavar="FEATURES", help="what nodes must have")
    add("--signal-seconds", type=int, metavar="S", help="saves so long before the end, default 120")
    add("--env", metavar="LINE", help="shell line that makes disttrain available on the node")
    add(
        "--sbatch-option",
        action="append",
        default=[],
        metavar="--NAME=VALUE",
        help="any other option of sbatch; may be given again",
    )
    add("--dry-run", action="store_true", help="print the script, write nothing")
    add("--test-only", action="store_true", help="ask sbatch whether it would take the job")
    add("--status", type=Path, metavar="RUN", help="how the newest job of a run folder stands")
    add("--cancel", type=Path, metavar="RUN", help="end the newest job of a run folder")


def joined(words: Sequence[str]) -> list[str]:
    """`--sbatch-option --x=y` as one word, because argparse takes no value that begins so."""
    found: list[str] = []
    for word in words:
        if found and found[-1] == "--sbatch-option":
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found


def add_world(parser: argparse.ArgumentParser) -> None:
    """Options that `launch` and `slurm` share: what is started, and how weights are spread."""
    parser.add_argument(
        "--fleet", type=Path, metavar="MANIFEST", help="train its subjects, each process for itself"
    )
    parser.add_argument(
        "--launcher", choices=LAUNCHERS, default="torchrun", help="default torchrun"
    )
    parser.add_argument(
        "--deepspeed", choices=STRATEGIES, help="the same as parallel.strategy=zero2 and so on"
    )
    parser.add_argument("--fsdp", action="store_true", help="the same as parallel.strategy=fsdp")
    parser.add_argument(
        "--offload", action="store_true", help="the same as parallel.offload_optimizer=true"
    )


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file, see configs/")
    _add_overrides(parser)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings to change"
    )


def strategy_of(options: Options) -> str | None:
    """The strategy that options name; refuses those that contradict each other."""
    if options.fsdp and options.deepspeed:
        raise UserError("--fsdp: given beside --deepspeed; remove one of the two")
    if options.fleet is not None and options.launcher != "torchrun":
        raise UserError("--launcher: workers of a fleet are started without one; remove it")
    chosen = "--deepspeed" if options.deepspeed else "--fsdp" if options.fsdp else ""
    chosen = chosen or ("--offload" if options.offload else "")
    if options.fleet is not None and chosen:
        raise UserError(f"{chosen}: each worker of a fleet is a world of its own; remove it")
    return "fsdp" if options.fsdp else options.deepspeed


def all_overrides(options: Options) -> list[str]:
    """The settings to change, those that options stand for among them."""
    strategy = strategy_of(options)
    found = [] if strategy is None else [f"parallel.strategy={strategy}"]
    if options.offload:
        found.append("parallel.offload_optimizer=true")
    return [*options.overrides, *found]


def check_config(options: Options) -> str:
    """Read the config as the processes will, so that mistakes are told at once; returns the
    name of the run."""
    from disttrain import schema
    from disttrain.config_file import load_config

    if options.fleet is None:
        return load_config(options.config, all_overrides(options)).name
    from disttrain.manifest import read_manifest

    tree = schema.apply_overrides(schema.read_mapping(options.config), options.overrides)
    return read_manifest(options.fleet, tree)[0].name
