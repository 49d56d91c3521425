"""The moving average of weights: its values, and that it changes nothing that trains."""

from __future__ import annotations

import pytest
import torch

from disttrain.engine.average import WeightAverage


def test_values_follow_the_formula() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    average = WeightAverage({"w": weight}, 0.5)
    expected = weight.detach().clone()
    for step in range(1, 20):
        with torch.no_grad():
            weight.add_(step)
        average.update([step])
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.detach()
        assert torch.allclose(average.values["w"], expected, rtol=1e-6)


def test_applied_shows_the_average_and_puts_everything_back() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    average = WeightAverage({"w": weight}, 0.9)
    with torch.no_grad():
        weight.mul_(10)
    average.update([1])
    before, mean = weight.detach().clone(), average.values["w"].clone()
    assert not torch.equal(before, mean)
    with average.applied():
        assert torch.equal(weight, mean)
    assert torch.equal(weight, before)
    assert torch.equal(average.values["w"], mean)
    with pytest.raises(KeyError), average.applied():
        raise KeyError
    assert torch.equal(weight, before)


def test_an_optimizer_goes_on_with_its_own_weights() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    average = WeightAverage({"w": weight}, 0.9)
    weight.grad = torch.ones(3)
    with average.applied():
        pass
    optimizer.step()
    assert torch.allclose(weight.detach(), torch.full((3,), 0.9))
    assert torch.equal(average.values["w"], torch.ones(3))
