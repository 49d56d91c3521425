"""One worker of a fleet: claims subjects, packs them, ends each with its result.

Invariant: workers meet in the run folder only. A subject is trained by whoever holds its lease,
goes on from its newest checkpoint whoever had it before, and ends as it would have alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from disttrain.config import RunConfig
from disttrain.engine.checkpoint import Checkpoint
from disttrain.engine.claims import Claims
from disttrain.engine.distributed import Mesh
from disttrain.engine.fleet_folder import (
    FAILED,
    FINISHED,
    STOPPED,
    TRAINING,
    FleetFolder,
    Status,
)
from disttrain.engine.fleet_progress import FleetProgress
from disttrain.engine.metrics import MetricsLog, StepRecord
from disttrain.engine.pack import Pack
from disttrain.engine.pack_size import MOST, fitting_size
from disttrain.engine.pictures import SubjectData, open_subject
from disttrain.engine.progress import Progress, join_names
from disttrain.engine.run_folder import write_subject_config
from disttrain.engine.settings_keys import pack_key, settings_key
from disttrain.engine.slot import Slot
from disttrain.engine.streams import StreamMaker
from disttrain.engine.work import Work
from disttrain.errors import UserError


class FleetWorker(Work):
    """The packs of one worker.

    Args:
        members: the settings of every subject, in the order of the manifest.
        retry: try failed subjects again.
    """

    def __init__(
        self,
        members: Sequence[RunConfig],
        mesh: Mesh,
        progress: Progress,
        claims: Claims,
        retry: bool,
    ) -> None:
        super().__init__(members[0], mesh, progress)
        self.members = {member.subjects[0].name: member for member in members}
        self.keys = {name: pack_key(member) for name, member in self.members.items()}
        self.settings = {name: settings_key(member) for name, member in self.members.items()}
        self.fleet = FleetFolder(self.config.folder)
        self.claims, self.retry = claims, retry
        self.board = FleetProgress(progress, self.fleet, list(self.members))
        self.bar = self.board
        size = self.config.fleet.pack_size
        self.pack_size = size if isinstance(size, int) else None
        self.maker: StreamMaker | None = None
        self.refused: dict[str, str] = {}
        """Reasons by subject that were found before anything was claimed."""
        self.logs: dict[str, MetricsLog] = {}
        self.losses: dict[str, float] = {}
        self._begun: dict[str, tuple[float, float]] = {}
        self._tried: set[str] = set()
        self._over: set[str] = set()
        """Subjects known to need no more training; they never come to need it while this runs."""
        self._states: dict[str, Checkpoint | None] = {}
        self._looked = time.monotonic()

    def next_pack(self) -> Pack | None:
        """The next pack of this worker; None when there is nothing left to claim."""
        while names := self._next_names():
            self.config = self.members[names[0]]
            self.mesh.set_accumulation(self.config.train.gradient_accumulation_steps)
            pack = self.assemble(self._open(names))
            if pack is None:
                continue
            if self.pack_size is None and self.config.together:
                self.pack_size = fitting_size(pack, self.claims.place.count)
                self.progress.say(f"pack size {self.pack_size} (fleet.pack_size: auto)")
                room = self._fair(self.pack_size) - len(pack.slots)
                self._change(pack, [], self._successors(pack, room))
            return pack
        return None

    def _next_names(self) -> list[str]:
        """Subjects of the next pack. While others train, waits for what they may lose."""
        fleet, said = self.config.fleet, False
        while True:
            names = self._take(self._fair(self.pack_size or 1))
            waits = fleet.wait_for_others and not self.claims.static
            if names or not waits or not self._open_subjects():
                return names
            if not said:
                self.progress.say("nothing left to claim; waiting in case others lose theirs")
                said = True
            time.sleep(min(5.0, fleet.lease_seconds / 4))

    def _open_subjects(self) -> int:
        """How many subjects still need training, by whomever."""
        return sum(map(self._needs_training, self.members))

    def _fair(self, size: int) -> int:
        """A pack's size that leaves something for the workers that start beside this one."""
        return max(1, min(size, -(-self._open_subjects() // self.claims.place.count)))

    def warn_of_others(self) -> None:
        """Subjects that were finished with other settings stay as they are; say so."""
        others = [
            name
            for name, key in self.settings.items()
            if not self._needs_training(name) and self.fleet.read(name).settings not in ("", key)
        ]
        if others:
            self.progress.warn(
                f"finished with other settings: {join_names(others)}; remove their folders in "
                f"{self.folder.path / 'subjects'} to train them again"
            )

    def _take(self, count: int, key: str = "") -> list[str]:
        """Claim up to `count` subjects that still need training, all of one pack key."""

        def wanted(name: str, taken: list[str]) -> bool:
            needed = key or (self.keys[taken[0]] if taken else "")
            fits = not needed or (self.keys[name] == needed and self.members[name].together)
            return fits and self._needs_training(name)

        return self.claims.take(self.members, count, wanted)

    def _needs_training(self, name: str) -> bool:
        if name in self._over:  # asked again and again, while others wait for the lock
            return False
        retry = self.retry and name not in self._tried
        needed = self.fleet.needs_training(self.members[name], retry)
        if not needed and not retry:
            self._over.add(name)
        return needed

    def _open(self, names: Sequence[str]) -> list[SubjectData]:
        """The subjects whose pictures and prompts are right; the others fail."""
        found = []
        for name in names:
            self._tried.add(name)
            self._begun[name] = (time.monotonic(), self.fleet.read(name).seconds)
            if name in self.refused:
                self.fail(name, self.refused[name])
                continue
            try:
                found.append(open_subject(self.members[name], self.progress))
            except UserError as error:
                self.fail(name, str(error))
        return found

    def subjects_in_memory(self, count: int) -> int:
        """As many as a pack of this worker may have."""
        return self.pack_size or MOST

    def make_slots(self, maker: StreamMaker, data: Sequence[SubjectData]) -> list[Slot]:
        """Slots of the subjects whose latents could be made; the others fail."""
        self.maker = maker
        found: list[Slot] = []
        for one in data:
            try:
                slots = super().make_slots(maker, [one])
            except UserError as error:
                self.fail(one.settings.name, str(error))
                continue
            found += [slot for slot in slots if self._begin(slot)]
        return found

    def _begin(self, slot: Slot) -> bool:
        """Look at a subject's checkpoint and open its log; a subject that must not go on fails."""
        try:
            state = self._states[slot.name] = super().saved_state(slot)
        except UserError as error:
            self.fail(slot.name, str(error))
            return False
        write_subject_config(self.folder, slot.name, slot.config)
        log = self.logs[slot.name] = MetricsLog(self.folder.subject(slot.name) / "metrics.jsonl")
        log.cut({slot.name: state.state["step"] if state else 0})
        self._record(slot.name, TRAINING)
        self.fleet.write_table(list(self.members))
        return True

    def saved_state(self, slot: Slot) -> Checkpoint | None:
        """A subject's newest checkpoint, as `make_slots` found it."""
        return self._states.pop(slot.name)

    def advice_to_start_over(self, slot: Slot) -> str:
        """How a person starts a subject over."""
        return f"remove {self.folder.checkpoints(slot.name)}"

    def _record(self, name: str, status: str, reason: str = "", slot: Slot | None = None) -> None:
        """Write a subject's status with what is known besides."""
        begun, before = self._begun[name]
        known = self.fleet.read(name)
        self.fleet.write(
            Status(
                name,
                status,
                steps=slot.step if slot else known.steps,
                max_steps=self.members[name].train.max_steps,
                loss=self.losses.get(name, known.loss),
                seconds=round(before + time.monotonic() - begun, 1),
                worker=self.claims.worker,
                reason=reason,
                settings=self.settings[name],
                picked=slot.end.picked if slot else known.picked,
                overtrained_for=slot.end.overtrained_for if slot else known.overtrained_for,
            )
        )

    def fail(self, name: str, reason: str, slot: Slot | None = None) -> None:
        """A subject cannot be trained; the others go on."""
        self.progress.warn(f"{name} failed: {reason}")
        if self.claims.holds(name):
            self._record(name, FAILED, reason, slot)
        self._let_go([name])

    def _let_go(self, names: Sequence[str]) -> None:
        for name in names:
            log = self.logs.pop(name, None)
            if log is not None:
                log.close()
        self.claims.release(names)
        self.fleet.write_table(list(self.members))

    def mark_finished(self, done: Sequence[Slot]) -> None:
        """Record subjects as finished; their results are in place."""
        for slot in done:
            end = slot.end
            of = f"result of step {end.picked}" if end.picked != end.steps else ""
            self._record(slot.name, FINISHED, of, slot)
            self.board.finished(slot.name, slot.step, self.losses.get(slot.name))

    def leave_marks(self, pack: Pack) -> None:
        """Checkpoints and previews; now and then a look at whether all are still this worker's."""
        if time.monotonic() - self._looked > self.config.fleet.lease_seconds / 4:
            self._looked = time.monotonic()
            self._drop_lost(pack)
        super().leave_marks(pack)

    def end_those_done(self, pack: Pack) -> None:
        """Results of finished subjects, but of those that another worker has by now."""
        if any(slot.done for slot in pack.active):
            self._drop_lost(pack)
        super().end_those_done(pack)

    def _drop_lost(self, pack: Pack) -> None:
        """A worker that slept longer than its leases lets go of what others took."""
        lost = [slot for slot in pack.active if not self.claims.holds(slot.name)]
        if lost:
            names = [slot.name for slot in lost]
            self.progress.warn(f"the leases of {join_names(names)} ran out, others have them")
            self._let_go(names)
            self._change(pack, lost, self._successors(pack, len(lost)))

    def after_end(self, pack: Pack, done: Sequence[Slot]) -> None:
        """Finished subjects leave; the next ones of the manifest take their slots."""
        self._let_go([slot.name for slot in done])
        self._change(pack, done, self._successors(pack, len(done)))

    def end_those_failed(self, pack: Pack, failed: Sequence[int]) -> None:
        """A subject whose loss or gradient is not finite fails alone."""
        slots = [pack.slots[i] for i in failed]
        for i, slot in zip(failed, slots, strict=True):
            self.fail(slot.name, pack.describe_failure(i), slot)
        if slots:
            self._change(pack, slots, self._successors(pack, len(slots)))

    def _successors(self, pack: Pack, count: int) -> list[Slot]:
        """Slots of newly claimed subjects that go with a pack."""
        found: list[Slot] = []
        assert self.maker is not None
        while self.config.together and len(found) < count:
            names = self._take(count - len(found), self.keys[pack.slots[0].name])
            if not names:
                break
            found += self.make_slots(self.maker, self._open(names))
        return found

    def _change(self, pack: Pack, leaving: Sequence[Slot], entering: Sequence[Slot]) -> None:
        """Put those that enter where others left; those that stay go on as they are."""
        if not leaving and not entering:
            return
        staying = [i for i, slot in enumerate(pack.slots) if slot not in leaving]
        slots = [*(pack.slots[i] for i in staying), *entering]
        if not slots:
            for slot in leaving:
                slot.idle = True
            return
        states: list[Checkpoint | None] = [pack.state_of(i) for i in staying]
        states += [self.saved_state(slot) for slot in entering]
        assert self.maker is not None
        self.place(pack, slots, states, self.maker.encoder)
        self.welcome(pack, entering)
        self.end_those_done(pack)

    def save(self, pack: Pack, slots: Sequence[Slot]) -> None:
        """Checkpoints of the slots that are still this worker's."""
        held = [slot for slot in slots if self.claims.holds(slot.name)]
        super().save(pack, held)
        for slot in held:
            self._record(slot.name, TRAINING, slot=slot)

    def too_large(self, pack: Pack) -> None:
        """Memory ran out: all go back to the queue as they are, to come again in smaller packs."""
        pack.optimizer.zero_grad(set_to_none=True)
        slots = pack.active
        if len(slots) == 1:
            self.fail(slots[0].name, "out of memory in a pack of one", slots[0])
            return
        self.pack_size = max(1, len(slots) // 2)
        self.save(pack, slots)
        self._let_go([slot.name for slot in slots])
        self.progress.warn(f"out of memory with {len(slots)} subjects; now {self.pack_size}")

    def write_curve(self, name: str) -> None:
        """Bring a subject's loss curve up to date."""
        self.logs[name].write_curve(name, self.folder.subject(name))

    def log(self, records: Sequence[StepRecord]) -> None:
        """Each subject's record goes to its own log."""
        self.board.slots = [
            (r.subject, r.step, self.members[r.subject].train.max_steps, r.loss) for r in records
        ]
        for record in records:
            self.losses[record.subject] = record.loss
            self.logs[record.subject].append([record])

    def place_of(self, pack: Pack) -> str:
        """Which subjects a worker that was asked to stop had."""
        return f"stopped with {len(pack.active)} subjects in training"

    def close(self) -> None:
        """Say of the subjects that are not at their end that nobody trains them now."""
        left = list(self.logs)
        for name in left:
            if self.claims.holds(name):
                self._record(name, STOPPED)
        if left:
            self._let_go(left)
