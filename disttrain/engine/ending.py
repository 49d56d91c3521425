"""When a subject is at its end, and what is remembered of it then.

Between the settings and everybody who asks: a slot, a run's queue, a fleet. Invariant: a pure
function of settings and numbers that were saved, so whoever asks, and whenever, hears the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from disttrain.config import TrainSettings


@dataclass(frozen=True)
class End:
    """A subject whose result is in place.

    `steps` were taken; the result is the state at step `picked`. `overtrained_for`: at how many of
    its last scorings, in a row, it was over-trained; 0 where it was not scored.
    """

    steps: int
    picked: int
    overtrained_for: int = 0

    def holds(self, train: TrainSettings) -> bool:
        """Whether it still is at its end under these settings."""
        return at_end(train, self.steps, self.overtrained_for)


def at_end(train: TrainSettings, steps: int, overtrained_for: int) -> bool:
    """Whether a subject has taken its steps, or was over-trained at enough scorings in a row."""
    return steps >= train.max_steps or (
        train.early_stop and overtrained_for >= train.early_stop_patience
    )
