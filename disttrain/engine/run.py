"""A run: its folder, the queue of packs still to train, saving and finishing them.

`open_run` makes every check that can refuse a run before it writes anything. Invariant: a subject
is marked finished only when its result is in place, so a run that was killed at any moment goes on
from its newest checkpoint and ends with the results of one that was not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from disttrain import schema
from disttrain.config import RunConfig
from disttrain.engine.batch_size import settle_batch
from disttrain.engine.checkpoint import newest_checkpoint, write_checkpoint
from disttrain.engine.distributed import Mesh
from disttrain.engine.metrics import MetricsLog
from disttrain.engine.optim import describe_learning_rate
from disttrain.engine.pack import Pack
from disttrain.engine.pictures import SubjectData, open_subject
from disttrain.engine.previews import draw_previews
from disttrain.engine.progress import Progress, join_names
from disttrain.engine.run_folder import (
    RunFolder,
    check_same_run,
    describe_environment,
    fresh_name,
    write_config,
)
from disttrain.engine.streams import StreamMaker, VaeEncoder
from disttrain.engine.text_cache import cache_prompts
from disttrain.errors import ConfigError
from disttrain.files import FolderLock, remove_temporaries, write_json
from disttrain.methods import METHODS
from disttrain.methods.base import token_warning
from disttrain.methods.batch import Batcher, SubjectStreams, make_loader
from disttrain.models.base import BaseModel, configured_base


class Run:
    """One run on this rank."""

    def __init__(self, config: RunConfig, mesh: Mesh, progress: Progress) -> None:
        self.config, self.mesh, self.progress = config, mesh, progress
        self.folder = RunFolder(config.folder)
        self.metrics = MetricsLog(self.folder)
        self.done = self.folder.finished()
        self.queue = packs_to_train(config, self.done)
        self.data: dict[str, SubjectData] = {}
        self.base: BaseModel | None = None
        self.steps_before = 0
        """Run steps of the packs before the current one: checkpoints are named by run step."""

    def check(self) -> None:
        """Find everything that is wrong with the base model or a subject's files."""
        self.base = self._load_base()
        for note in self.base.notes:
            self.progress.warn(note)
        METHODS[self.config.method.name].check(self.base, self.config)
        if self.config.data.resolution % self.base.latent_scale:
            raise ConfigError(
                f"data.resolution: {self.config.data.resolution} is not a multiple of the base "
                f"model's {self.base.latent_scale}"
            )
        waiting = {name for names in self.queue for name in names}
        for subject in self.config.subjects:
            if subject.name in waiting:
                self.data[subject.name] = open_subject(self.config, subject, self.progress)
                warning = token_warning(self.config, self.base.tokenizer, subject)
                if warning:
                    self.progress.warn(warning)

    def _load_base(self) -> BaseModel:
        self.progress.say(f"loading base model {self.config.base_model}")
        return configured_base(self.config)

    def make_pack(self, names: list[str]) -> Pack:
        """The pack of these subjects, at the step of its newest checkpoint."""
        base, self.base = self.base or self._load_base(), None
        data = [self.data[name] for name in names]
        maker = StreamMaker(self.config, self.mesh, base, self.progress)
        streams, sources = maker.make(data)
        pack = Pack(self.config, self.mesh, base, [item.settings for item in data])
        cache_prompts(self.config, self.mesh, data, pack.contexts, self.progress)
        pack.feed(self._batcher(pack, streams, maker.encoder), sources)
        self._restore(pack)
        if self.mesh.is_main:
            steps = {**self.done, **dict.fromkeys(pack.names, pack.step)}
            self.metrics.cut(steps)
        if pack.step == 0 and self.config.train.sample_every:
            self.preview(pack)
        return pack

    def _batcher(self, pack: Pack, streams: list[SubjectStreams], encoder: VaeEncoder) -> Batcher:
        mesh, config = self.mesh, self.config
        on_gpu = mesh.device.type == "cuda"
        loader = make_loader(config, streams, mesh.rank, mesh.world, on_gpu, self._warn_here)
        contexts = None if pack.method.trains_text else pack.contexts
        encode = None if config.data.cache_latents else encoder
        return Batcher(
            config, pack.base, pack.method, streams, loader, contexts, encode, mesh.device
        )

    def _warn_here(self, text: str) -> None:
        """A warning of this rank alone, which may be any."""
        self.progress.warn_from(self.mesh.rank, text)

    def _restore(self, pack: Pack) -> None:
        found = newest_checkpoint(self.folder.checkpoints)
        if found is None:
            return
        path, checkpoint, damaged = found
        for line in damaged:
            self.progress.warn(f"passed over {line}")
        if checkpoint.state["subjects"] != pack.names:
            self.steps_before = checkpoint.state["run_step"]
            return
        pack.restore(checkpoint, str(path))
        self.steps_before = checkpoint.state["run_step"] - pack.step
        self.progress.say(f"going on from step {pack.step} ({path})")

    def save(self, pack: Pack) -> None:
        """Write a checkpoint; every rank calls it, rank zero writes."""
        state = pack.state()
        run_step = self.steps_before + pack.step
        checkpoint = replace(state, state={"run_step": run_step, **state.state})
        keep = self.config.train.keep_checkpoints

        def write() -> None:
            write_checkpoint(self.folder.checkpoints, run_step, checkpoint, keep)
            self.metrics.write_curves(pack.names)
            with pack.averaged():
                self._export(pack, "steps")

        self.mesh.on_rank_zero(write)

    def preview(self, pack: Pack) -> None:
        """Draw preview pictures; every rank calls it, rank zero draws."""

        def draw() -> None:
            with pack.averaged():
                draw_previews(pack, self.config, self.folder)

        self.mesh.on_rank_zero(draw)

    def _export(self, pack: Pack, where: str) -> None:
        """Results as they stand: final ones, or small copies beside a checkpoint."""
        for slot, name in enumerate(pack.names):
            folder = self.folder.subject(name)
            if where == "final":
                pack.method.export(slot, folder, name, pack.step)
            elif self.config.packable:
                pack.method.export(slot, folder / "steps", f"{name}-{pack.step:08d}", pack.step)

    def finish(self, pack: Pack) -> None:
        """Save, export and mark a pack's subjects as finished."""
        train = self.config.train
        self.save(pack)
        if train.sample_prompts and not (
            train.sample_every and pack.step % train.sample_every == 0
        ):
            self.preview(pack)

        def write() -> None:
            with pack.averaged():
                self._export(pack, "final")
            self.folder.mark_finished(pack.names, pack.step)

        self.mesh.on_rank_zero(write)
        self.done.update(dict.fromkeys(pack.names, pack.step))
        self.steps_before += pack.step

    def track(self, values: dict[str, Any], step: int) -> None:
        """Hand values to the trackers, if any were asked for."""
        if self.config.train.trackers:
            self.mesh.accelerator.log(values, step=step)

    def report(self) -> None:
        """Say where the results lie."""
        for name in self.done:
            folder = self.folder.subject(name)
            result = folder / (f"{name}.safetensors" if self.config.packable else "model")
            self.progress.say(f"result      {result}")
            self.progress.say(f"loss curve  {folder / 'loss.svg'}")
            if (folder / "samples").is_dir():
                self.progress.say(f"previews    {folder / 'samples'}")


def packs_to_train(config: RunConfig, done: dict[str, int]) -> list[list[str]]:
    """Names of the subjects still to train, by pack: all together, or one after another.

    Raises:
        ConfigError: finished subjects of a queue cannot go on when only the last one's state is
            kept.
    """
    short = [s.name for s in config.subjects if done.get(s.name, 0) < config.train.max_steps]
    if config.together:
        return [short] if short else []
    last = list(done)[-1] if done else None
    lost = [name for name in short if name in done and name != last]
    if lost:
        raise ConfigError(
            f"train.max_steps: {join_names(lost)} finished at {done[lost[0]]} steps and only the "
            "last subject of a queue keeps its state; train it under another run name"
        )
    begun = [name for name in short if name in done]
    return [[name] for name in [*begun, *(name for name in short if name not in done)]]


@contextmanager
def open_run(config: RunConfig, mesh: Mesh, progress: Progress, fresh: bool) -> Iterator[Run]:
    """A run whose folder is locked, described and ready; or one with nothing left to do.

    Raises:
        UserError: the run must not start; nothing was written.
    """
    if fresh:
        config = replace(config, name=mesh.on_rank_zero(lambda: fresh_name(config).name))
    config = settle_batch(config, mesh.world, fresh)
    mesh.set_accumulation(config.train.gradient_accumulation_steps)
    if RunFolder(config.folder).config.is_file():
        check_same_run(RunFolder(config.folder), config)
    run = Run(config, mesh, progress)
    if not run.queue:
        progress.say(
            f"{config.folder} is finished at step {max(run.done.values())}; raise train.max_steps "
            "to go on, or use --fresh to start over in a new folder"
        )
        yield run
        return
    run.check()
    locks: list[FolderLock] = []
    mesh.on_rank_zero(lambda: locks.append(FolderLock(config.folder)))
    try:
        _describe(run)
        yield run
    finally:
        run.metrics.close()
        for lock in locks:
            lock.release()


def _describe(run: Run) -> None:
    """Write config.yaml and environment.json, start trackers, print what is about to happen."""
    config, mesh = run.config, run.mesh
    rate = describe_learning_rate(config, mesh.world)
    environment = {**describe_environment(mesh.world, mesh.device), "learning_rate": rate}

    def write() -> None:
        remove_temporaries(run.folder.path)
        write_config(run.folder, config)
        write_json(run.folder.environment, environment)

    mesh.on_rank_zero(write)
    if config.train.trackers:
        mesh.start_trackers(config.name, config.folder, schema.flatten(schema.to_mapping(config)))
    run.progress.say(f"run folder {run.folder.path}")
    run.progress.say(rate["step"])
    run.progress.say(rate["text"])
