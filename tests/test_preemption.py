"""Signals become a flag that travels with the losses; nothing is interrupted."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest
import torch

from disttrain.engine.preemption import WATCHED, StopRequest


@pytest.fixture(autouse=True)
def _handlers_come_back() -> Iterator[None]:
    before = {watched: signal.getsignal(watched) for watched in WATCHED}
    yield
    after = {watched: signal.getsignal(watched) for watched in WATCHED}
    assert after == before


def test_the_signals_of_schedulers_and_people_are_watched() -> None:
    expected = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
    assert set(WATCHED) == expected


@pytest.mark.parametrize("number", WATCHED)
def test_a_signal_sets_the_flag_and_interrupts_nothing(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        reached = True
        assert stop.received is number
    assert reached


def test_the_first_signal_is_remembered() -> None:
    with StopRequest() as stop:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert stop.received is signal.SIGTERM


def test_own_handlers_come_back_also_after_an_error() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    try:
        with pytest.raises(RuntimeError, match="inside"), StopRequest():
            raise RuntimeError("inside")
        os.kill(os.getpid(), signal.SIGUSR1)
        assert seen == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_another_thread_may_train_without_watching() -> None:
    """Only the main thread may set handlers; elsewhere the context must still work."""
    results: list[object] = []

    def work() -> None:
        try:
            with StopRequest() as stop:
                results.append(stop.received)
        except ValueError as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [None]


def test_the_flag_travels_as_one_more_value() -> None:
    losses = torch.tensor([1.5, 2.5], dtype=torch.float64)
    with StopRequest() as stop:
        quiet = stop.beside(losses)
        os.kill(os.getpid(), signal.SIGTERM)
        asked = stop.beside(losses)
    assert quiet.tolist() == [1.5, 2.5, 0.0]
    assert asked.tolist() == [1.5, 2.5, 1.0]
    assert asked.dtype == losses.dtype
    assert losses.shape == (2,)
    *means, stopping = ((quiet + 63 * quiet + asked) / 65).tolist()  # one of 65 ranks was asked
    assert means == [1.5, 2.5]
    assert stopping > 0
