"""A subject in training: its settings, its data, and how far it is.

What a pack is made of. Invariant: nothing here is about the other subjects of the pack.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from disttrain.config import RunConfig, SubjectSettings
from disttrain.methods.batch import SubjectStreams


@dataclass
class Slot:
    """One subject's place in a pack.

    `config` holds this subject alone, with its own steps and learning rate. `source` is the digest
    of what it is taught from. `cursor` counts the pictures it has seen. An `idle` subject has
    reached its steps and waits for the others.
    """

    config: RunConfig
    streams: SubjectStreams
    source: str
    step: int = 0
    cursor: int = 0
    idle: bool = False

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
        """Whether it has taken all its steps."""
        return self.step >= self.config.train.max_steps


def alone(config: RunConfig, subject: SubjectSettings) -> RunConfig:
    """The settings of one of a config's subjects."""
    return replace(config, subjects=(subject,))
