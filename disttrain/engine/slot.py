"""A subject in training: its settings, its data, and how far it is.

What a pack is made of. Invariant: nothing here is about the other subjects of the pack.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from disttrain.config import RunConfig, SubjectSettings
from disttrain.engine.ending import End, at_end
from disttrain.engine.history import History
from disttrain.methods.batch import SubjectStreams


@dataclass
class Slot:
    """One subject's place in a pack.

    `config` holds this subject alone, with its own steps and learning rate. `source` is the digest
    of what it is taught from. `cursor` counts the pictures it has seen. An `idle` subject is at
    its end and waits for the others. `history` holds its scores where `train.early_stop` asks for
    them; `picked` is the step whose state its result is of, once there is one.
    """

    config: RunConfig
    streams: SubjectStreams
    source: str
    step: int = 0
    cursor: int = 0
    idle: bool = False
    history: History = field(default_factory=History)
    picked: int | None = None

    @property
    def subject(self) -> SubjectSettings:
        """The subject's settings."""
        return self.config.subjects[0]

    @property
    def name(self) -> str:
        """The subject's name."""
        return self.subject.name

    @property
    def done(self) -> bool:
        """Whether it is at its end."""
        return at_end(self.config.train, self.step, self.history.overtrained_for)

    @property
    def unscored(self) -> bool:
        """Whether its state is one of those to score, and was not scored yet."""
        train = self.config.train
        due = self.step % train.checkpoint_every == 0 or self.step >= train.max_steps
        return train.early_stop and self.step > 0 and due and not self.history.has(self.step)

    @property
    def end(self) -> End:
        """What to remember of it once its result is in place."""
        picked = self.step if self.picked is None else self.picked
        return End(self.step, picked, self.history.overtrained_for)


def alone(config: RunConfig, subject: SubjectSettings) -> RunConfig:
    """The settings of one of a config's subjects."""
    return replace(config, subjects=(subject,))
