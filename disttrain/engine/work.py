"""What a process does with packs: makes them, saves them, ends their subjects with a result.

Shared by a run, whose processes train one pack together, and by a worker of a fleet, which has its
own. Invariant: a subject is called finished only when its result is in place, so whoever was killed
at any moment goes on from its newest checkpoint and ends with the result of one that was not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from disttrain.config import RunConfig
from disttrain.engine.checkpoint import (
    Checkpoint,
    checkpoint_path,
    newest_checkpoint,
    read_checkpoint,
    read_when_visible,
    write_checkpoint,
)
from disttrain.engine.distributed import Mesh
from disttrain.engine.examiner import Examiner
from disttrain.engine.history import History
from disttrain.engine.metrics import StepRecord
from disttrain.engine.pack import Pack, refuse_other
from disttrain.engine.pictures import SubjectData
from disttrain.engine.previews import draw_previews
from disttrain.engine.progress import Progress
from disttrain.engine.run_folder import RunFolder
from disttrain.engine.slot import Slot
from disttrain.engine.streams import StreamMaker, VaeEncoder
from disttrain.engine.text_cache import cache_prompts
from disttrain.errors import CheckpointError
from disttrain.methods.batch import Batcher, make_loader
from disttrain.models.base import BaseModel, configured_base

Found = tuple[Path, Checkpoint, list[str]]
"""A checkpoint, and a line for each damaged one that was passed over."""


class Bar(Protocol):
    """What shows a pack's steps."""

    def start(self, what: str, total: int, done: int) -> None:
        """A pack begins."""
        ...

    def advance(self, done: int, total: int, what: str, detail: str, left: str = "") -> None:
        """After each update."""
        ...

    def stop(self) -> None:
        """A pack ended."""
        ...


class Work(ABC):
    """The packs of one process. `config` is what its subjects share."""

    def __init__(self, config: RunConfig, mesh: Mesh, progress: Progress) -> None:
        self.config, self.mesh, self.progress = config, mesh, progress
        self.folder = RunFolder(config.folder)
        self.base: BaseModel | None = None
        """Freshly loaded; the next pack takes it."""
        self.bar: Bar = progress
        """Where a pack's steps are shown."""
        self.examiner = Examiner(mesh)

    def load_base(self) -> BaseModel:
        """The configured base model, as it is before a method changes it."""
        base, self.base = self.base, None
        if base is None:
            self.progress.say(f"loading base model {self.config.base_model}")
            base = configured_base(self.config, self.progress.say, self._warn_here)
        return base

    def assemble(self, data: Sequence[SubjectData]) -> Pack | None:
        """The pack of these subjects, each at the step of its newest checkpoint; None if none is
        left of them."""
        if not data:
            return None
        base = self.load_base()
        maker = StreamMaker(
            self.config, self.mesh, base, self.progress, self.subjects_in_memory(len(data))
        )
        slots = self.make_slots(maker, data)
        if not slots:
            self.base = base
            return None
        pack = Pack(self.config, self.mesh, base, slots)
        cache_prompts(self.config, self.mesh, data, pack.contexts, self.progress)
        self.place(pack, slots, [self.saved_state(slot) for slot in slots], maker.encoder)
        self.welcome(pack, slots)
        return pack

    def welcome(self, pack: Pack, slots: Sequence[Slot]) -> None:
        """What is due when these slots have entered a pack: previews of those that have not begun,
        to compare with, and scores of those that were saved before they were scored."""
        fresh = [slot for slot in slots if slot.step == 0]
        if fresh and self.config.train.sample_every:
            self.preview(pack, fresh)
        self.score(pack)

    def subjects_in_memory(self, count: int) -> int:
        """How many subjects' latents a pack that begins with `count` may come to hold."""
        return count

    def make_slots(self, maker: StreamMaker, data: Sequence[SubjectData]) -> list[Slot]:
        """Slots of subjects with their data, at their start."""
        streams, sources = maker.make(data)
        slots = [
            Slot(one.config, stream, sources[one.settings.name])
            for one, stream in zip(data, streams, strict=True)
        ]
        for slot in slots:
            if slot.config.train.early_stop:
                slot.history = History(self.examiner.know(slot.config))
        return slots

    def place(
        self,
        pack: Pack,
        slots: Sequence[Slot],
        states: Sequence[Checkpoint | None],
        encoder: VaeEncoder,
    ) -> None:
        """Fill a pack with these slots in these states, and connect their data."""
        config, mesh = self.config, self.mesh
        if config.train.early_stop:  # before arranging, which may put a trained model in place
            self.examiner.admit(pack, slots)
        pack.arrange(slots, states)
        streams = [slot.streams for slot in slots]
        on_gpu = mesh.device.type == "cuda"
        loader = make_loader(config, streams, mesh.rank, mesh.world, on_gpu, self._warn_here)
        contexts = None if pack.method.trains_text else pack.contexts
        encode = None if config.data.cache_latents else encoder
        device = mesh.device
        pack.feed(
            Batcher(config, pack.base, pack.method, streams, loader, contexts, encode, device)
        )

    def _warn_here(self, text: str) -> None:
        """A warning of this rank alone, which may be any."""
        self.progress.warn_from(self.mesh.rank, text)

    def saved_state(self, slot: Slot) -> Checkpoint | None:
        """A subject's newest whole checkpoint.

        Raises:
            CheckpointError: there are some but none is whole, or it is of other pictures or
                settings.
        """
        folder = self.folder.checkpoints(slot.name)
        found = self._read_alike(lambda: newest_checkpoint(folder))
        if found is None:
            return None
        path, checkpoint, damaged = found
        for line in damaged:
            self.progress.warn(f"passed over {line}")
        if checkpoint.state["subject"] != slot.name:
            raise CheckpointError(f"{path}: belongs to {checkpoint.state['subject']}")
        refuse_other(slot, checkpoint, self.advice_to_start_over(slot))
        step = checkpoint.state["step"]
        self.progress.say(f"{slot.name}: going on from step {step} ({path})")
        scored = checkpoint.state.get("scored", {})
        if slot.config.train.early_stop and scored.get("yardstick") != slot.history.yardstick:
            self.progress.warn(
                f"{slot.name}: earlier states were not scored, or by other pictures or score.*, "
                "and will not be chosen"
            )
        return checkpoint

    def _read_alike(self, choose: Callable[[], Found | None]) -> Found | None:
        """What rank zero finds, on every rank. One rank chooses: on shared file systems the others
        may see an older folder for a while."""
        read: list[Checkpoint] = []

        def on_rank_zero() -> tuple[Path, list[str]] | None:
            found = choose()
            if found is None:
                return None
            read.append(found[1])
            return found[0], found[2]

        chosen = self.mesh.on_rank_zero(on_rank_zero)
        if chosen is None:
            return None
        path, damaged = chosen
        return path, self.mesh.alike(lambda: read[0] if read else read_when_visible(path)), damaged

    def save(self, pack: Pack, slots: Sequence[Slot]) -> None:
        """Write checkpoints of some slots; every rank calls it, rank zero writes."""
        chosen = [(i, slot) for i, slot in enumerate(pack.slots) if slot in slots]
        states = [(i, slot, pack.state_of(i)) for i, slot in chosen]
        keep = self.config.train.keep_checkpoints

        def write() -> None:
            for _, slot, state in states:
                folder = self.folder.checkpoints(slot.name)
                write_checkpoint(folder, slot.step, state, keep, spared=slot.history.kept)
                self.write_curve(slot.name)

        def export() -> None:
            for i, slot, _ in states:
                folder = self.folder.subject(slot.name) / "steps"
                pack.method.export(i, folder, f"{slot.name}-{slot.step:08d}", slot.step)

        self.mesh.on_rank_zero(write)
        if self.config.packable:
            with pack.whole():
                self.mesh.on_rank_zero(export)

    def preview(self, pack: Pack, slots: Sequence[Slot]) -> None:
        """Draw preview pictures of some slots; every rank calls it, rank zero draws."""

        with pack.whole():
            self.mesh.on_rank_zero(lambda: draw_previews(pack, slots, self.config, self.folder))

    def score(self, pack: Pack) -> None:
        """Score the states that are due and were not; every rank calls it and hears the same."""
        due = [slot for slot in pack.active if slot.unscored]
        if not due:
            return
        for slot, scores in zip(due, self.examiner.examine(pack, due), strict=True):
            slot.history.add(slot.step, scores, held_out=bool(slot.subject.held_out))
            if self.progress.details:
                self.progress.say(f"{slot.name}: {slot.history.newest()}")

    def leave_marks(self, pack: Pack) -> None:
        """Scores, checkpoints and previews that are due after an update. Those at their end are
        saved there."""
        train = self.config.train
        self.score(pack)
        going_on = [slot for slot in pack.active if not slot.done]
        due = [slot for slot in going_on if slot.step % train.checkpoint_every == 0]
        if due:
            self.save(pack, due)
        shown = [s for s in pack.active if train.sample_every and s.step % train.sample_every == 0]
        if shown:
            self.preview(pack, shown)

    def end_those_done(self, pack: Pack) -> None:
        """Results of the subjects that are at their end; they leave, or wait."""
        done = [slot for slot in pack.active if slot.done]
        if not done:
            return
        train = self.config.train
        self.save(pack, done)
        unseen = [s for s in done if not (train.sample_every and s.step % train.sample_every == 0)]
        if train.sample_prompts and unseen:
            self.preview(pack, unseen)
        for slot in done:
            if slot.config.train.early_stop:
                self._put_back(pack, slot)

        def write() -> None:
            for i, slot in enumerate(pack.slots):
                if slot in done:
                    folder = self.folder.subject(slot.name)
                    pack.method.export(i, folder, slot.name, slot.end.picked)
            self.mark_finished(done)

        with pack.whole():
            self.mesh.on_rank_zero(write)
        self.after_end(pack, done)

    def _put_back(self, pack: Pack, slot: Slot) -> None:
        """Give a subject at its end the weights of its best state, which become its result."""
        history = slot.history
        kept = slot.step if history.kept is None else history.kept
        if kept != slot.step:
            path = checkpoint_path(self.folder.checkpoints(slot.name), kept)

            def choose() -> Found | None:
                try:
                    return path, read_checkpoint(path), []
                except CheckpointError as error:
                    self.progress.warn(f"{error}; the result of {slot.name} is its last state")
                    return None

            found = self._read_alike(choose)
            if found is None:
                return
            pack.put_back(slot, found[1])
        slot.picked = kept
        self.progress.say(f"{slot.name}: {history.summary(slot.step)}")

    @abstractmethod
    def end_those_failed(self, pack: Pack, failed: Sequence[int]) -> None:
        """What becomes of slots whose loss or gradient was not finite; there may be none."""

    @abstractmethod
    def after_end(self, pack: Pack, done: Sequence[Slot]) -> None:
        """What becomes of the slots of subjects whose results are in place."""

    @abstractmethod
    def place_of(self, pack: Pack) -> str:
        """Where a pack that was asked to stop stands."""

    @abstractmethod
    def advice_to_start_over(self, slot: Slot) -> str:
        """How a person starts a subject over."""

    @abstractmethod
    def mark_finished(self, done: Sequence[Slot]) -> None:
        """Record subjects as finished; their results are in place. Rank zero calls it."""

    @abstractmethod
    def write_curve(self, name: str) -> None:
        """Bring a subject's loss curve up to date. Rank zero calls it."""

    @abstractmethod
    def log(self, records: Sequence[StepRecord]) -> None:
        """Keep the records of one update. Rank zero calls it."""
