"""An exponential moving average of what trains, from which results are made.

Beside the optimizer. Invariant: the average changes nothing that trains; while it is `applied` no
step is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class WeightAverage:
    """Average of each tensor over the steps of a run.

    `average = d * average + (1 - d) * value` after each step, with `d` rising to `decay` as
    `(1 + step) / (10 + step)`, so that early steps are soon forgotten (TensorFlow's
    ExponentialMovingAverage; Polyak and Juditsky 1992).
    """

    def __init__(self, parameters: dict[str, Tensor], decay: float) -> None:
        assert 0 < decay < 1
        self.parameters, self.decay = parameters, decay
        self.values = {name: value.detach().clone() for name, value in parameters.items()}

    @torch.no_grad()
    def update(self, steps: Sequence[int]) -> None:
        """Take in the weights after update number `steps[s]`, counted from 1, of each subject s."""
        shares = [1 - min(self.decay, (1 + step) / (10 + step)) for step in steps]
        current = [self.parameters[name] for name in self.values]
        averages = list(self.values.values())
        if len(set(shares)) == 1:
            # One fused call for all tensors; torch has no public name for it.
            torch._foreach_lerp_(averages, current, shares[0])  # pyright: ignore[reportPrivateImportUsage]
            return
        for average, value in zip(averages, current, strict=True):
            share = average.new_tensor(shares).view(-1, *[1] * (average.dim() - 1))
            average.lerp_(value, share)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters hold the average inside, and what they held before afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, average in self.values.items():
            parameter = self.parameters[name]
            parameter.data, self.values[name] = average, parameter.data
