"""The commands that look at results: `sample`, `score` and `doctor`, each with its options.

Below `cli.py`. Imported for `--help`, so nothing heavy is imported here outside functions.
Invariant: what a command prints on standard output is its answer; how far it is goes to standard
error.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from disttrain.errors import EXIT_DONE


def add_sample(sample: argparse.ArgumentParser) -> None:
    """The options of `disttrain sample`."""
    sample.add_argument("run", type=Path, metavar="RUN", help="run folder")
    sample.add_argument("--prompt", required=True, help="with {token} and {class_name}")
    sample.add_argument("--negative-prompt", default="", help="what not to show")
    sample.add_argument("--subject", default="", help="which subject; default: the first")
    sample.add_argument("--step", type=int, help="use the copy saved at this step")
    sample.add_argument("--count", type=int, default=1, help="pictures to draw, default 1")
    sample.add_argument("--seed", type=int, default=0, help="seed of the first, default 0")
    sample.add_argument(
        "--steps", type=int, help="denoising steps; default: the run's train.sample_steps"
    )
    sample.add_argument(
        "--guidance-scale", type=float, help="default: the run's train.sample_guidance_scale"
    )
    sample.add_argument("--size", type=int, help="side in pixels; default: the run's resolution")
    sample.add_argument("--output", type=Path, help="folder; default RUN/samples")


def run_sample(options: argparse.Namespace) -> int:
    """Draw pictures and print where they lie."""
    from disttrain.review.sample import SampleRequest, sample

    request = SampleRequest(
        prompt=options.prompt,
        negative_prompt=options.negative_prompt,
        subject=options.subject,
        step=options.step,
        count=options.count,
        seed=options.seed,
        steps=options.steps,
        guidance_scale=options.guidance_scale,
        size=options.size,
    )
    for path in sample(options.run, request, options.output or options.run / "samples"):
        print(path)
    return EXIT_DONE


def add_score(score: argparse.ArgumentParser) -> None:
    """The options of `disttrain score`."""
    score.add_argument("run", type=Path, metavar="RUN", help="run folder")
    score.add_argument("--subject", default="", help="which subject; default: all")
    score.add_argument(
        "--pictures", type=int, metavar="N", help="for each prompt; default: score.pictures"
    )
    score.add_argument(
        "--steps", type=int, metavar="N", help="denoising steps; default: score.steps"
    )
    score.add_argument(
        "--seed", type=int, metavar="N", help="of the first picture; default: score.seed"
    )
    score.add_argument(
        "--features", default="", metavar="MODEL", help="what decides; default: score.features"
    )
    score.add_argument(
        "--held-out",
        default="",
        metavar="FOLDER",
        help="pictures that training did not see; default: subjects.N.held_out",
    )
    score.add_argument(
        "--clip", default="", metavar="MODEL", help="report CLIP-I and CLIP-T too; folder or hub id"
    )
    score.add_argument(
        "--dino", default="", metavar="MODEL", help="report DINO too; folder or hub id"
    )


def run_score(options: argparse.Namespace) -> int:
    """Score every state of a run's subjects and print a table of each."""
    from disttrain.review.score import ScoreRequest, score
    from disttrain.review.score_table import lines_of

    request = ScoreRequest(
        subject=options.subject,
        pictures=options.pictures,
        steps=options.steps,
        seed=options.seed,
        features=options.features,
        held_out=options.held_out,
        clip=options.clip,
        dino=options.dino,
    )
    for found in score(options.run, request):
        for line in lines_of(found, options.run / "subjects" / found.name):
            print(line, flush=True)
    return EXIT_DONE


def add_doctor(doctor: argparse.ArgumentParser) -> None:
    """The options of `disttrain doctor`."""
    text = "under a launcher: what its processes see of each other; they must share OUTPUT_DIR"
    doctor.add_argument(
        "--distributed", nargs="?", const="runs", metavar="OUTPUT_DIR", help=f"{text} (runs)"
    )


def run_doctor(options: argparse.Namespace) -> int:
    """Show versions, devices and what is missing."""
    from disttrain.review.doctor import examine, examine_together

    return examine() if options.distributed is None else examine_together(options.distributed)
