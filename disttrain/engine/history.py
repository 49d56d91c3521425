"""What was found of one subject whenever it was scored in training, and the state that is kept.

Between `scores.py` and a slot. Invariant: a pure function of what was added, and `saved` is all of
it: a subject that was killed, moved or resumed keeps the same state and ends at the same step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from disttrain.engine.overtraining import FEWEST_LOSSES, Reading, verdict
from disttrain.engine.scores import Scores

PLACES = 4
"""Decimals of scores that count. A pack or several processes change rounding, far beyond these."""


@dataclass
class History:
    """The scorings of one subject so far.

    `yardstick` is the digest of what it is measured against. `kept` is the step of the state that
    is to be its result. `loss` is the sum of the `losses` that came since the last scoring.
    """

    yardstick: str = ""
    readings: list[Reading] = field(default_factory=list)
    kept: int | None = None
    overtrained_for: int = 0
    loss: float = 0.0
    losses: int = 0

    def add_loss(self, loss: float) -> None:
        """The loss of one step."""
        self.loss += loss
        self.losses += 1

    def add(self, step: int, scores: Scores, *, held_out: bool) -> None:
        """The scores of the state at a step, which is later than those before.

        What the verdict picks is kept as soon as it comes. It may go back to an earlier state when
        one with a larger standard error comes; the one that is kept is within that error too.
        """
        loss = self.loss / self.losses if self.losses >= FEWEST_LOSSES else None
        self.readings.append(Reading(step, rounded(scores), loss))
        self.loss, self.losses = 0.0, 0
        found = verdict(self.readings, held_out=held_out)
        self.overtrained_for = found.overtrained_for
        if self.kept is None or found.best_step == step:
            self.kept = step

    def has(self, step: int) -> bool:
        """Whether the state at a step was scored."""
        return any(reading.step == step for reading in self.readings)

    def newest(self) -> str:
        """The newest scoring in words."""
        reading = self.readings[-1]
        scores = reading.scores
        text = (
            f"step {reading.step} scored, subject fidelity {scores.subject:.3f} "
            f"(standard error {scores.subject_error:.3f}), drift {scores.drift:.3f}"
        )
        return text + (f"; over-trained {self.overtrained_for} times" * bool(self.overtrained_for))

    def summary(self, step: int) -> str:
        """What becomes of a subject that ends at a step, in words."""
        why = f"over-trained at the last {self.overtrained_for} scorings, " * (
            self.overtrained_for > 0
        )
        count = len(self.readings)
        return f"{why}ends at step {step}; its result is step {self.kept}, best of {count} scored"

    def saved(self) -> dict[str, Any]:
        """All of it as JSON holds it."""
        own = {part.name: getattr(self, part.name) for part in fields(self)}
        return {**own, "readings": [asdict(reading) for reading in self.readings]}

    @classmethod
    def restored(cls, saved: Mapping[str, Any] | None, yardstick: str) -> History:
        """What `saved` gave; empty if there is none or it was measured against something else."""
        if saved is None or saved["yardstick"] != yardstick:
            return cls(yardstick)
        readings = [
            Reading(one["step"], Scores(**one["scores"]), one["loss"]) for one in saved["readings"]
        ]
        return cls(**{**saved, "readings": readings})


def rounded(scores: Scores) -> Scores:
    """Scores with the decimals that count."""
    numbers = {name: getattr(scores, name) for name in vars(scores)}
    return replace(
        scores,
        **{k: round(v, PLACES) for k, v in numbers.items() if isinstance(v, float)},
    )
