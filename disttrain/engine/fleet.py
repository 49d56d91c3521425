"""A fleet: many subjects of a manifest, each finished exactly once, by any number of workers.

What `disttrain fleet` does. Invariant: running it again does what is missing and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from disttrain import schema
from disttrain.config import RunConfig
from disttrain.engine.batch_size import settle_batch
from disttrain.engine.claims import Claims
from disttrain.engine.class_images import class_image_folder, class_images_lock, given_class_images
from disttrain.engine.distributed import Mesh, WorkerPlace, leave_launcher
from disttrain.engine.fleet_folder import FAILED, FINISHED, STOPPED, TRAINING, FleetFolder
from disttrain.engine.fleet_worker import FleetWorker
from disttrain.engine.preflight import preflight
from disttrain.engine.progress import Progress
from disttrain.engine.rank_logs import worker_log
from disttrain.engine.run import check_base
from disttrain.engine.run_folder import describe_environment
from disttrain.engine.train import train_pack
from disttrain.errors import ConfigError, DataError, UserError
from disttrain.files import exclusively, write_json
from disttrain.methods import METHODS


def train_fleet(members: Sequence[RunConfig], retry: bool = False) -> int:
    """Train what is missing of a fleet, as one of its workers; returns how many subjects failed.

    Args:
        members: the settings of every subject, in the order of the manifest.
        retry: try failed subjects again.

    Raises:
        UserError: nothing can be trained; `Interrupted` after a signal.
    """
    place = leave_launcher()
    members = settled(members)
    if nothing_left(members, retry):
        return report(FleetFolder(members[0].folder), [m.subjects[0].name for m in members])
    with Mesh(members[0]) as mesh, open_fleet(members, mesh, place, retry) as worker:
        while (pack := worker.next_pack()) is not None:
            with pack.feeding():
                try:
                    train_pack(worker, pack)
                except torch.OutOfMemoryError:
                    worker.too_large(pack)
            del pack
            worker.maker = None
            mesh.release()
        return report(worker.fleet, list(worker.members))


def settled(members: Sequence[RunConfig]) -> list[RunConfig]:
    """Every member with its batch settled for a worker of its own.

    Raises:
        ConfigError: members differ in what a worker has one of.
    """
    for key in ("name", "output_dir", "mixed_precision", "fleet", "parallel"):
        values = {getattr(member, key) for member in members}
        if len(values) > 1:
            raise ConfigError(f"{key}: must be the same for all subjects of a fleet")
    first = members[0]
    for key in ("offload_optimizer", "deepspeed_config", "force"):
        if getattr(first.parallel, key):
            raise ConfigError(f"parallel.{key}: workers of a fleet split nothing; remove it")
    if first.packable and not first.data.cache_latents:
        raise ConfigError("data.cache_latents: a fleet trains on cached latents; remove it")
    if first.train.trackers:
        raise ConfigError("train.trackers: not for fleets; each subject has its metrics.jsonl")
    return [settle_batch(member, 1, fresh=True) for member in members]


@contextmanager
def open_fleet(
    members: Sequence[RunConfig], mesh: Mesh, place: WorkerPlace, retry: bool
) -> Iterator[FleetWorker]:
    """A worker with the base loaded and checked, and the class pictures drawn."""
    config, progress = members[0], Progress(shown=True, details=False)
    preflight(config, mesh, progress, "fleet")
    fleet = FleetFolder(config.folder)
    static = config.fleet.claim == "static"
    claims = Claims(fleet.claims, config.fleet.lease_seconds, place, static)
    worker = FleetWorker(members, mesh, progress, claims, retry)
    base = worker.base = worker.load_base()
    check_base(config, base, progress)
    if config.train.early_stop:
        worker.examiner.check(config)
    for name, member in worker.members.items():
        try:
            METHODS[member.method.name].check(base, member)
        except UserError as error:
            worker.refused[name] = str(error)
    environment = describe_environment(1, mesh.device) | {"workers": place.count}
    try:
        fleet.path.mkdir(parents=True, exist_ok=True)
        fleet.remember(list(worker.members))
        write_json(fleet.path / "environment.json", environment)
    except OSError as error:
        raise DataError(f"{fleet.path}: {error.strerror or error}") from error
    with worker_log(fleet.run.logs, progress), claims:
        worker.warn_of_others()
        progress.say(f"fleet of {len(members)} subjects in {fleet.path}, worker {claims.worker}")
        _draw_class_pictures(worker, place)
        fleet.write_table(list(worker.members))
        try:
            yield worker
        finally:
            worker.close()


def _draw_class_pictures(worker: FleetWorker, place: WorkerPlace) -> None:
    """All that the fleet needs, while the base is untouched; workers begin at different ones."""
    assert worker.base is not None
    members = list(worker.members.values())
    start = place.number * len(members) // place.count
    for member in [*members[start:], *members[:start]]:
        (subject,) = member.subjects
        if member.prior is None or subject.name in worker.refused:
            continue
        try:
            given = given_class_images(member, subject)
            have = len(given.records) if given is not None else 0
            with exclusively(class_images_lock(member, subject)):
                class_image_folder(member, worker.mesh, worker.base, subject, have, worker.progress)
        except UserError as error:
            worker.refused[subject.name] = str(error)


def nothing_left(members: Sequence[RunConfig], retry: bool) -> bool:
    """Whether no subject needs training, whoever asks."""
    fleet = FleetFolder(members[0].folder)
    return not any(fleet.needs_training(member, retry) for member in members)


def report(fleet: FleetFolder, names: list[str]) -> int:
    """Say how the fleet stands; returns how many subjects failed."""
    progress = Progress(shown=True)
    statuses = [fleet.read(name) for name in names]
    finished = sum(status.status == FINISHED for status in statuses)
    failed = sum(status.status == FAILED for status in statuses)
    left = len(names) - finished - failed
    progress.say(
        f"{finished} of {len(names)} subjects finished, {failed} failed, {left} not at their end"
    )
    progress.say(f"table       {fleet.path / 'fleet.csv'}")
    if failed:
        progress.say("mend what failed and run again with --retry-failed")
    return failed


def fleet_plan(members: Sequence[RunConfig]) -> list[str]:
    """What `fleet --dry-run` prints: every subject, and the settings in which subjects differ."""
    flat = [schema.flatten(schema.to_mapping(member)) for member in members]
    differing = [
        key
        for key in dict.fromkeys(key for own in flat for key in own)
        if not key.startswith("subjects.") and len({own.get(key) for own in flat}) > 1
    ]
    lines = [f"fleet of {len(members)} subjects in {members[0].folder}"]
    for member, own in zip(members, flat, strict=True):
        (subject,) = member.subjects
        other = [f"{key}={own[key]}" for key in differing if key in own]
        lines.append(
            f"  {subject.name}  {subject.images}  token {subject.token}  {' '.join(other)}"
        )
    lines.append("nothing was written (dry run)")
    return lines


def status_lines(folder: FleetFolder, claims: Claims) -> list[str]:
    """What `fleet --status` prints.

    Raises:
        DataError: not a fleet's folder.
    """
    names = folder.names()
    owners = claims.owners()
    lines = []
    counts: dict[str, int] = {}
    for name in names:
        status = folder.read(name)
        orphaned = status.status == TRAINING and name not in owners
        word = TRAINING if name in owners else STOPPED if orphaned else status.status
        counts[word] = counts.get(word, 0) + 1
        loss = "" if status.loss is None else f"loss {status.loss:.4f}"
        by = owners.get(name, status.worker)
        lines.append(
            f"{name:24} {word:9} {status.steps:>6}/{status.max_steps:<6} {loss:12} "
            f"{status.seconds:8.1f}s  {by}  {status.reason}".rstrip()
        )
    lines.append(", ".join(f"{count} {word}" for word, count in sorted(counts.items())))
    return lines
