"""The command line: each command is a few lines into a module below.

First thing a person meets. Heavy packages are imported inside the commands, so that `--help` is
instant. Invariant: exit code 0 means done, 2 means something to mend (one line on standard error),
3 that training went wrong, 75 that a signal stopped it after a checkpoint.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from disttrain import __version__
from disttrain.cluster.commands import add_launch, add_slurm, joined
from disttrain.cluster.exit_codes import told
from disttrain.errors import EXIT_DONE, EXIT_TRAINING_FAILED, EXIT_USER_ERROR, UserError
from disttrain.review.commands import (
    add_doctor,
    add_sample,
    add_score,
    run_doctor,
    run_sample,
    run_score,
)

EXAMPLES = {
    "train": "disttrain train configs/lora.yaml train.max_steps=200 subjects.0.token=ohwx",
    "cache": "disttrain cache configs/finetune.yaml",
    "fleet": "disttrain fleet examples/fleet.csv configs/lora.yaml name=examples",
    "launch": "disttrain launch configs/lora.yaml --nproc 2",
    "slurm": "disttrain slurm configs/lora.yaml --nodes 2 --gpus-per-node 8 --time 12:00:00",
    "shard": "disttrain shard examples/subjects/fox shards/fox --max-size 100MB",
    "sample": 'disttrain sample runs/fox-lora --prompt "a photo of {token} {class_name}"',
    "score": "disttrain score runs/fox-lora --pictures 4",
    "doctor": "disttrain doctor",
    "keys": "disttrain keys optim",
}


def build_parser() -> argparse.ArgumentParser:
    """The whole command-line surface."""
    parser = argparse.ArgumentParser(
        prog="disttrain",
        description="Teach Stable Diffusion new subjects: textual inversion, LoRA and DreamBooth, "
        "on one process or many.",
        epilog="Start with: disttrain train configs/lora.yaml",
    )
    parser.add_argument("--version", action="version", version=f"disttrain {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    _add_train(commands)
    _add_fleet(commands)
    add_launch(_command(commands, "launch", "train on several processes or machines"))
    add_slurm(_command(commands, "slurm", "submit a training or a fleet as a SLURM job"))
    _add_shard(commands)
    add_sample(_command(commands, "sample", "draw pictures with what a run has learned"))
    add_score(_command(commands, "score", "measure how well a run learned its subjects"))
    add_doctor(_command(commands, "doctor", "show versions, devices and what is missing"))
    keys = _command(commands, "keys", "list every config key with its help")
    keys.add_argument("prefix", nargs="?", default="", help="only keys that start with this")
    return parser


_Commands = argparse._SubParsersAction  # argparse has no public name for it


def _add_train(commands: _Commands[argparse.ArgumentParser]) -> None:
    train = _command(commands, "train", "teach the subjects of a config; goes on where it stopped")
    _add_config(train)
    train.add_argument("--fresh", action="store_true", help="start over in a new folder NAME-2")
    train.add_argument(
        "--dry-run", action="store_true", help="check and print the plan, write nothing"
    )
    _add_config(_command(commands, "cache", "encode a config's pictures and prompts for training"))


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file, see configs/")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings to change"
    )


def _add_fleet(commands: _Commands[argparse.ArgumentParser]) -> None:
    fleet = _command(commands, "fleet", "train many subjects of a manifest, packed and in parallel")
    fleet.add_argument(
        "manifest",
        nargs="?",
        type=Path,
        metavar="MANIFEST",
        help="CSV, JSONL or YAML with a row for each subject, or a folder of folders",
    )
    fleet.add_argument("config", nargs="?", type=Path, metavar="CONFIG", help="YAML file")
    fleet.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings to change"
    )
    fleet.add_argument("--status", type=Path, metavar="RUN", help="show how a fleet stands")
    fleet.add_argument("--retry-failed", action="store_true", help="try failed subjects again")
    fleet.add_argument(
        "--dry-run", action="store_true", help="check and print the subjects, write nothing"
    )


def _add_shard(commands: _Commands[argparse.ArgumentParser]) -> None:
    shard = _command(commands, "shard", "turn a folder of pictures into webdataset tar shards")
    shard.add_argument("source", nargs="?", type=Path, metavar="SRC", help="folder of pictures")
    shard.add_argument(
        "destination", nargs="?", type=Path, metavar="DST", help="folder for the tars"
    )
    shard.add_argument("--samples-per-shard", type=int, default=1000, help="default 1000")
    shard.add_argument(
        "--max-size", default="256MB", metavar="SIZE", help="size of a shard, default 256MB"
    )
    shard.add_argument(
        "--index",
        nargs="+",
        metavar="PLACE",
        help="index tars that exist already: paths or URLs, with * or {000..099}",
    )
    shard.add_argument(
        "--output", type=Path, metavar="INDEX", help="with --index: default index.json beside them"
    )
    shard.add_argument(
        "--caption-key",
        metavar="KEY",
        help="which key of .json members (default caption), or which column of SRC's "
        "metadata.jsonl or .csv (default text, else caption), holds captions",
    )
    shard.add_argument("--workers", type=int, help="tars at once; default: one a core, at most 8")
    shard.add_argument("--verify", metavar="INDEX", help="look for damaged shards")


def _command(
    commands: _Commands[argparse.ArgumentParser], name: str, text: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name, help=text, description=text.capitalize() + ".", epilog=f"example: {EXAMPLES[name]}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code, which a launch that started it is told too."""
    return told(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = build_parser()
    options, rest = parser.parse_known_args(
        joined(sys.argv[1:] if arguments is None else arguments)
    )
    if "overrides" in options:  # overrides may also stand after an option
        words = [word for word in rest if not word.startswith("-")]
        options.overrides = [*options.overrides, *words]
        rest = [word for word in rest if word.startswith("-")]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    # Read by OpenMP when torch is imported: idle threads sleep instead of spinning, without which a
    # run slows down many times over when another program wants the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return COMMANDS[options.command](options)
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        prefix = f"[{socket.gethostname()} rank {rank}] " if rank != "0" else ""
        print(f"{prefix}disttrain: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("disttrain: interrupted; the same command starts or goes on", file=sys.stderr)
        return 130
    except BrokenPipeError:  # output piped into head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_USER_ERROR


def _train(options: argparse.Namespace) -> int:
    from disttrain.config_file import load_config

    config = load_config(options.config, options.overrides)
    if options.dry_run:
        from disttrain.engine.plan import print_plan

        print_plan(config)
        return EXIT_DONE
    from disttrain.engine.train import train

    train(config, fresh=options.fresh)
    return EXIT_DONE


def _cache(options: argparse.Namespace) -> int:
    from disttrain.config_file import load_config

    config = load_config(options.config, options.overrides)
    from disttrain.engine.cache import fill_caches

    fill_caches(config)
    return EXIT_DONE


def _fleet(options: argparse.Namespace) -> int:
    if options.status is not None:
        from disttrain.engine.claims import Claims
        from disttrain.engine.distributed import WorkerPlace
        from disttrain.engine.fleet import status_lines
        from disttrain.engine.fleet_folder import FleetFolder

        folder = FleetFolder(options.status)
        claims = Claims(folder.claims, 0, WorkerPlace(0, 1), static=False)
        for line in status_lines(folder, claims):
            print(line)
        return EXIT_DONE
    if options.manifest is None or options.config is None:
        raise UserError("fleet: give MANIFEST and CONFIG, or --status RUN")
    from disttrain import schema
    from disttrain.manifest import read_manifest

    tree = schema.apply_overrides(schema.read_mapping(options.config), options.overrides)
    members = read_manifest(options.manifest, tree)
    from disttrain.engine.fleet import fleet_plan, train_fleet

    if options.dry_run:
        for line in fleet_plan(members):
            print(line)
        return EXIT_DONE
    return EXIT_TRAINING_FAILED if train_fleet(members, options.retry_failed) else EXIT_DONE


def _launch(options: argparse.Namespace) -> int:
    from disttrain.cluster.node import launch

    return launch(options)


def _slurm(options: argparse.Namespace) -> int:
    from disttrain.cluster import slurm_job, slurm_status

    run: Path | None = options.status
    if options.cancel is not None:
        slurm_job.refuse_beside(options, "--cancel")
        return slurm_status.cancel(options.cancel)
    if run is None:
        return slurm_job.submit(options)
    slurm_job.refuse_beside(options, "--status")
    slurm_status.status(run)
    return _fleet(options) if (run / "manifest.json").is_file() else EXIT_DONE


def _shard(options: argparse.Namespace) -> int:
    if options.samples_per_shard < 1:
        raise UserError("--samples-per-shard: must be at least 1")
    if options.workers is not None and options.workers < 1:
        raise UserError("--workers: must be at least 1")
    if options.output is not None and not options.index:
        raise UserError("--output: says where --index writes; give it with --index")
    if options.verify:
        return _verify(options)
    if options.index:
        return _index(options)
    if options.source is None or options.destination is None:
        raise UserError("shard: give SRC and DST, or --index PLACE, or --verify INDEX")
    largest = _size(options.max_size, "--max-size")
    from disttrain.data.shards import write_shards
    from disttrain.engine.progress import Progress

    with Progress(shown=True).counter("pictures packed") as count:
        index = write_shards(
            options.source,
            options.destination,
            samples_per_shard=options.samples_per_shard,
            bytes_per_shard=largest,
            workers=options.workers,
            caption_column=options.caption_key or "",
            progress=count,
        )
    print(f"wrote {index}")
    return EXIT_DONE


def _index(options: argparse.Namespace) -> int:
    from disttrain.data.indexing import CAPTION_KEY, expand_patterns, index_tars
    from disttrain.engine.progress import Progress

    tars = expand_patterns(options.index)
    output = options.output
    if output is None:
        for place in tars:
            if not isinstance(place, Path):
                raise UserError(f"{place}: cannot write beside it; give --output INDEX.json")
        output = Path(tars[0]).parent / "index.json"
    progress = Progress(shown=True)
    with progress.counter("tars indexed") as count:
        report = index_tars(
            tars,
            output,
            workers=options.workers,
            caption_key=options.caption_key or CAPTION_KEY,
            progress=count,
        )
    for name in report.skipped:
        progress.warn(f"left out: {name}")
    print(f"wrote {report.path} ({report.samples} samples)")
    return EXIT_DONE


def _verify(options: argparse.Namespace) -> int:
    from disttrain.data.indexing import verify
    from disttrain.engine.progress import Progress

    with Progress(shown=True).counter("shards checked") as count:
        damaged = verify(options.verify, workers=options.workers, progress=count)
    for line in damaged:
        print(line)
    print(f"{len(damaged)} damaged" if damaged else "all shards are whole")
    return EXIT_USER_ERROR if damaged else EXIT_DONE


def _size(text: str, option: str) -> int:
    """Bytes of a size such as 256MB, 1.5GiB or 1000000."""
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) *([KMGT]?)(i?)B?", text.strip(), re.I)
    if found is None or (found[3] and not found[2]):
        raise UserError(f"{option}: {text!r} is no size; write 256MB or 1GiB")
    base = 1024 if found[3] else 1000
    size = int(float(found[1]) * base ** " KMGT".index(found[2].upper() or " "))
    if size < 1:
        raise UserError(f"{option}: must be at least one byte")
    return size


def _keys(options: argparse.Namespace) -> int:
    from disttrain import schema
    from disttrain.config import RunConfig

    rows = [row for row in schema.describe(RunConfig) if row[0].startswith(options.prefix)]
    if not rows:
        raise UserError(f"no key starts with '{options.prefix}'; disttrain keys lists them all")
    for key, default, text in rows:
        print(f"{key}  [{default}]\n    " + " ".join(text.split()))
    return EXIT_DONE


COMMANDS = {
    "train": _train,
    "cache": _cache,
    "fleet": _fleet,
    "launch": _launch,
    "slurm": _slurm,
    "shard": _shard,
    "sample": run_sample,
    "score": run_score,
    "doctor": run_doctor,
    "keys": _keys,
}
