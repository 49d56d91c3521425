"""A run: its folder, and the queue of packs still to train by all processes together.

`open_run` makes every check that can refuse a run before it writes anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from disttrain import schema
from disttrain.config import RunConfig
from disttrain.engine.batch_size import settle_batch
from disttrain.engine.distributed import Mesh
from disttrain.engine.ending import End
from disttrain.engine.metrics import MetricsLog, StepRecord, tracker_values
from disttrain.engine.optim import describe_learning_rate
from disttrain.engine.pack import Pack
from disttrain.engine.pictures import SubjectData, open_subject
from disttrain.engine.progress import Progress
from disttrain.engine.rank_logs import rank_log
from disttrain.engine.run_folder import (
    RunFolder,
    check_same_run,
    describe_environment,
    fresh_name,
    write_config,
)
from disttrain.engine.slot import Slot, alone
from disttrain.engine.work import Work
from disttrain.errors import ConfigError, TrainingFailed
from disttrain.files import FolderLock, remove_temporaries, write_json
from disttrain.methods import METHODS
from disttrain.methods.base import token_warning
from disttrain.models.base import BaseModel


class Run(Work):
    """One run on this rank."""

    def __init__(self, config: RunConfig, mesh: Mesh, progress: Progress) -> None:
        super().__init__(config, mesh, progress)
        self.metrics = MetricsLog(self.folder.metrics)
        self.done = mesh.on_rank_zero(self.folder.finished)
        self.queue = packs_to_train(config, self.done)
        self.data: dict[str, SubjectData] = {}

    def check(self) -> None:
        """Find everything that is wrong with the base model or a subject's files."""
        self.base = self.load_base()
        check_base(self.config, self.base, self.progress)
        if self.config.train.early_stop:
            self.examiner.check(self.config)
        waiting = {name for names in self.queue for name in names}
        for subject in self.config.subjects:
            if subject.name in waiting:
                member = alone(self.config, subject)
                self.data[subject.name] = open_subject(member, self.progress)
                warning = token_warning(self.config, self.base.tokenizer, subject)
                if warning:
                    self.progress.warn(warning)

    def make_pack(self, names: list[str]) -> Pack:
        """The pack of these subjects, at the steps of their newest checkpoints."""
        pack = self.assemble([self.data[name] for name in names])
        assert pack is not None
        if self.mesh.is_main:
            steps = {slot.name: slot.step for slot in pack.slots}
            ended = {name: end.steps for name, end in self.done.items()}
            self.metrics.cut({**ended, **steps})
        return pack

    def mark_finished(self, done: Sequence[Slot]) -> None:
        """Record subjects as finished in progress.json."""
        self.folder.mark_finished({slot.name: slot.end for slot in done})

    def after_end(self, pack: Pack, done: Sequence[Slot]) -> None:
        """Finished subjects idle until the others are: with several processes tensors keep their
        shape."""
        for slot in done:
            slot.idle = True
        self.done.update({slot.name: slot.end for slot in done})

    def end_those_failed(self, pack: Pack, failed: Sequence[int]) -> None:
        """The run ends, as one cause may be in all.

        Raises:
            TrainingFailed: naming the subjects.
        """
        if failed:
            lines = "; ".join(pack.describe_failure(i) for i in failed)
            raise TrainingFailed(
                f"{lines}. Look at the pictures and run again, or use --fresh with a lower "
                "learning rate"
            )

    def place_of(self, pack: Pack) -> str:
        """Where a pack that was asked to stop stands."""
        return f"stopped at step {max(slot.step for slot in pack.active)}"

    def advice_to_start_over(self, slot: Slot) -> str:
        """How a person starts a subject over."""
        return "use --fresh"

    def write_curve(self, name: str) -> None:
        """Bring a subject's loss curve up to date."""
        self.metrics.write_curve(name, self.folder.subject(name))

    def log(self, records: Sequence[StepRecord]) -> None:
        """Metrics of one update, and trackers if any were asked for."""
        self.metrics.append(records)
        if self.config.train.trackers and records:
            self.mesh.accelerator.log(tracker_values(records), step=records[0].step)

    def report(self) -> None:
        """Say where the results lie."""
        for name, end in self.done.items():
            folder = self.folder.subject(name)
            result = folder / (f"{name}.safetensors" if self.config.packable else "model")
            of = f" (state of step {end.picked} of {end.steps})" if end.picked != end.steps else ""
            self.progress.say(f"result      {result}{of}")
            self.progress.say(f"loss curve  {folder / 'loss.svg'}")
            if (folder / "samples").is_dir():
                self.progress.say(f"previews    {folder / 'samples'}")


def check_base(config: RunConfig, base: BaseModel, progress: Progress) -> None:
    """Refuse settings that do not fit the base model; say what it leaves to be said.

    Raises:
        ConfigError: naming the key.
    """
    for note in base.notes:
        progress.warn(note)
    METHODS[config.method.name].check(base, config)
    if config.data.resolution % base.latent_scale:
        raise ConfigError(
            f"data.resolution: {config.data.resolution} is not a multiple of the base model's "
            f"{base.latent_scale}"
        )


def packs_to_train(config: RunConfig, done: dict[str, End]) -> list[list[str]]:
    """Names of the subjects still to train, by pack: all together, or one after another."""
    ended = {name for name, end in done.items() if end.holds(config.train)}
    short = [s.name for s in config.subjects if s.name not in ended]
    if config.together:
        return [short] if short else []
    return [[name] for name in short]


def keys_to_raise(config: RunConfig, done: dict[str, End]) -> str:
    """The settings that keep finished subjects from going on."""
    early = [end.steps < config.train.max_steps for end in done.values()]
    keys = ["train.early_stop_patience"] * any(early) + ["train.max_steps"] * (not all(early))
    return " or ".join(keys)


@contextmanager
def open_run(config: RunConfig, mesh: Mesh, progress: Progress, fresh: bool) -> Iterator[Run]:
    """A run whose folder is locked, described and ready; or one with nothing left to do.

    Raises:
        UserError: the run must not start; nothing was written.
    """
    if fresh:
        config = replace(config, name=mesh.on_rank_zero(lambda: fresh_name(config).name))
    config = mesh.on_rank_zero(lambda: _admitted(config, mesh.world, fresh))
    mesh.set_accumulation(config.train.gradient_accumulation_steps)
    run = Run(config, mesh, progress)
    if not run.queue:
        progress.say(
            f"{config.folder} is finished at step {max(end.steps for end in run.done.values())}; "
            f"raise {keys_to_raise(config, run.done)} to go on, or use --fresh to start over in a "
            "new folder"
        )
        yield run
        return
    run.check()
    locks: list[FolderLock] = []
    mesh.on_rank_zero(lambda: locks.append(FolderLock(config.folder)))
    try:
        with rank_log(run.folder.logs, mesh.rank, mesh.world, progress):
            _describe(run)
            yield run
    finally:
        run.metrics.close()
        for lock in locks:
            lock.release()


def _admitted(config: RunConfig, world: int, fresh: bool) -> RunConfig:
    """The config with its batch settled, if it may go on in its folder. Rank zero alone looks: on
    shared file systems the others may see an older folder for a while."""
    config = settle_batch(config, world, fresh)
    if RunFolder(config.folder).config.is_file():
        check_same_run(RunFolder(config.folder), config)
    return config


def _describe(run: Run) -> None:
    """Write config.yaml and environment.json, start trackers, print what is about to happen."""
    config, mesh = run.config, run.mesh
    rate = describe_learning_rate(config, mesh.world)
    environment = describe_environment(mesh.world, mesh.device)
    environment |= {"learning_rate": rate, "strategy": mesh.strategy}

    def write() -> None:
        remove_temporaries(run.folder.path)
        write_config(run.folder, config)
        write_json(run.folder.environment, environment)

    mesh.on_rank_zero(write)
    if config.train.trackers:
        mesh.start_trackers(config.name, config.folder, schema.flatten(schema.to_mapping(config)))
    run.progress.say(f"run folder {run.folder.path}")
    asked = config.parallel.strategy
    if mesh.strategy != "ddp":
        run.progress.say(f"split over {mesh.world} processes by {mesh.strategy}")
    elif asked not in ("auto", "ddp"):
        run.progress.say(f"parallel.strategy: {asked} has nothing to split on one process")
    run.progress.say(rate["step"])
    run.progress.say(rate["text"])
