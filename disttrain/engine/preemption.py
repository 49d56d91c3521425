"""Signals that ask a run to stop: Ctrl-C, a scheduler's notice, a kill.

A handler only sets a flag; the loop carries it to all ranks with the step's own reduction, so every
rank saves and stops at the same step. Invariant: no signal handled here interrupts a step.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

import torch
from torch import Tensor

WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Remembers the first of the watched signals; a context manager around training."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for watched in WATCHED:
                self._previous[watched] = signal.signal(watched, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for watched, handler in self._previous.items():
            signal.signal(watched, handler)  # type: ignore[arg-type]

    def beside(self, values: Tensor) -> Tensor:
        """`values` with one more element: 1 if this rank was asked to stop, else 0.

        Averaged over ranks with the values, it is above 0 everywhere if any rank was asked.
        """
        flag = values.new_tensor([float(self.received is not None)])
        return torch.cat([values, flag])

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
