"""Learning rates, clipping and the packed optimizer against torch's own, in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_config
from torch import Tensor, nn

from disttrain.config import OptimSettings, RunConfig
from disttrain.config_file import parse_config
from disttrain.engine.optim import (
    PackedAdamW,
    clip_gradients,
    describe_learning_rate,
    gradient_norms,
    learning_rate_factor,
    make_optimizer,
    schedule_factor,
    set_rates,
)
from disttrain.methods.base import ParameterGroup

SHAPES = [(4, 6), (7, 4), (2, 3, 5)]
GRID = (1, 2, 3, 8, 64)


@pytest.fixture
def source() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def drawn(source: torch.Generator, subjects: int) -> list[Tensor]:
    """One tensor `[subjects, ...]` per shape."""
    return [
        torch.randn((subjects, *shape), generator=source, dtype=torch.float64) for shape in SHAPES
    ]


def close(left: Tensor, right: Tensor) -> bool:
    return torch.allclose(left, right, rtol=0, atol=1e-12)


def take_steps(
    source: torch.Generator, subjects: int, rates: list[float], decay: float, steps: int = 20
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The same steps by one packed optimizer and by a torch.optim.AdamW for each subject."""
    start = drawn(source, subjects)
    packed = [nn.Parameter(tensor.clone()) for tensor in start]
    alone = [[nn.Parameter(t[s].clone()) for t in start] for s in range(subjects)]
    betas, eps = (0.85, 0.97), 1e-7
    one = PackedAdamW([{"params": packed}], betas, eps, decay)
    many = [
        torch.optim.AdamW(own, rate, betas, eps, decay)
        for own, rate in zip(alone, rates, strict=True)
    ]
    for step in range(steps):
        scale = 1.0 / (1 + step)  # a schedule, so that a rate kept from before would show
        one.param_groups[0]["lr"] = (
            rates[0] * scale if subjects == 1 else torch.tensor(rates, dtype=torch.float64) * scale
        )
        for gradient, parameter, s_all in zip(
            drawn(source, subjects), packed, zip(*alone, strict=True), strict=True
        ):
            parameter.grad = gradient
            for s, own in enumerate(s_all):
                own.grad = gradient[s].clone()
        one.step()
        for optimizer, rate in zip(many, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * scale
            optimizer.step()
    return list(packed), [list(own) for own in alone]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_pack_of_one_is_torch_adamw(source: torch.Generator, decay: float) -> None:
    packed, alone = take_steps(source, 1, [3e-2], decay)
    assert all(close(p[0], own) for p, own in zip(packed, alone[0], strict=True))


def test_a_pack_of_three_is_three_adamw_with_their_own_rates(source: torch.Generator) -> None:
    packed, alone = take_steps(source, 3, [1e-1, 1e-3, 3e-2], decay=0.05)
    for s in range(3):
        assert all(close(p[s], own) for p, own in zip(packed, alone[s], strict=True))


def test_a_subject_with_rate_zero_stays_where_it_is(source: torch.Generator) -> None:
    start = [tensor.clone() for tensor in drawn(torch.Generator().manual_seed(0), 2)]
    packed, _ = take_steps(source, 2, [0.0, 1e-2], decay=0.1, steps=2)
    for before, after in zip(start, packed, strict=True):
        assert torch.equal(before[0], after[0])
        assert not torch.equal(before[1], after[1])


def test_tensors_without_a_gradient_get_no_state(source: torch.Generator) -> None:
    parameters = [nn.Parameter(tensor) for tensor in drawn(source, 2)]
    optimizer = PackedAdamW([{"params": parameters, "lr": 1.0}], (0.9, 0.999), 1e-8, 0.0)
    parameters[0].grad = torch.ones_like(parameters[0])
    optimizer.step()
    assert set(optimizer.state) == {parameters[0]}
    assert optimizer.state[parameters[0]]["step"].tolist() == [1.0, 1.0]


def config_with(method: str = "lora", **optim: Any) -> RunConfig:
    tree = small_config(method, Path("runs"))
    tree["optim"].update(optim)
    return parse_config(tree)


@pytest.mark.parametrize(
    ("method", "kind", "decay"),
    [
        ("lora", PackedAdamW, 0.01),
        ("textual_inversion", PackedAdamW, 0.0),
        ("dreambooth", torch.optim.AdamW, 0.01),
    ],
)
def test_the_configured_optimizer(method: str, kind: type, decay: float) -> None:
    given = {"adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6}
    own = {} if method == "textual_inversion" else {"text_encoder_learning_rate": 1e-5}
    config = config_with(method, **given, **own)
    rate = config.optim.learning_rate
    text_rate = 1e-5 if own else rate
    slower = config_with(method, learning_rate=1e-4, weight_decay=0.3)
    groups = [
        ParameterGroup("unet", {"x": nn.Parameter(torch.zeros(2, 2))}),
        ParameterGroup("text_encoder", {"y": nn.Parameter(torch.zeros(2, 2))}),
    ]
    optimizer = make_optimizer(config, groups)
    assert type(optimizer) is kind
    members = [config] if kind is torch.optim.AdamW else [config, slower]
    set_rates(optimizer, members, [4.0, 0.5][: len(members)])
    first, second = optimizer.param_groups
    if kind is torch.optim.AdamW:
        assert (first["lr"], second["lr"]) == (4 * rate, 4 * text_rate)
        assert first["weight_decay"] == decay
    else:
        assert first["lr"].tolist() == pytest.approx([4 * rate, 0.5 * 1e-4])
        assert second["lr"].tolist() == pytest.approx([4 * text_rate, 0.5 * 1e-4])
        assert first["weight_decay"].tolist() == [decay, 0.3]
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.8, 0.9), 1e-6)


@pytest.mark.parametrize("world", GRID)
@pytest.mark.parametrize("batch", GRID)
@pytest.mark.parametrize("accumulation", GRID)
def test_learning_rate_law(world: int, batch: int, accumulation: int) -> None:
    samples = world * batch * accumulation
    expected = {"linear": samples, "sqrt": samples**0.5, "none": 1}
    for rule, factor in expected.items():
        assert learning_rate_factor(rule, world, batch, accumulation) == pytest.approx(
            factor, rel=1e-15
        )


def test_the_derivation_is_told_in_words() -> None:
    tree = small_config("lora", Path("runs"), gradient_accumulation_steps=3)
    texts = {}
    for rule in ("linear", "sqrt", "none"):
        tree["optim"]["scale_lr"] = rule
        found = describe_learning_rate(parse_config(tree), data_parallel=2)
        assert found["learning_rate"] == pytest.approx(1e-3 * found["factor"])
        assert (found["base"], found["rule"]) == (1e-3, rule)
        texts[rule] = found["text"]
    product = "2 processes x 4 batch x 3 accumulation"
    assert texts == {
        "linear": f"learning rate 0.024 = 0.001 x {product}",
        "sqrt": f"learning rate {1e-3 * math.sqrt(24):g} = 0.001 x sqrt({product})",
        "none": "learning rate 0.001 = 0.001 x 1 (scale_lr: none)",
    }


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, *(1 - i / 8 for i in range(8))]),
        ("cosine", [0.25, 0.5, 0.75, *((1 + math.cos(math.pi * i / 8)) / 2 for i in range(8))]),
    ],
)
def test_schedules_with_a_warm_up(schedule: Any, expected: list[float]) -> None:
    optim = OptimSettings(learning_rate=1.0, lr_schedule=schedule, lr_warmup_steps=3)
    found = [schedule_factor(optim, step, 11) for step in range(11)]
    assert found == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (0, 5), (5, 5), (4, 5)])
def test_every_step_of_every_schedule_moves(schedule: Any, warmup: int, steps: int) -> None:
    optim = OptimSettings(learning_rate=1.0, lr_schedule=schedule, lr_warmup_steps=warmup)
    found = [schedule_factor(optim, step, steps) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in found)
    assert warmup or found[0] == 1


@pytest.mark.parametrize("subjects", [1, 3])
@pytest.mark.parametrize("limit", [0.5, 10.0, 1e6])
def test_norms_and_clipping_are_torchs_for_each_subject(
    source: torch.Generator, subjects: int, limit: float
) -> None:
    sizes = torch.tensor([1.0, 1e-3, 40.0], dtype=torch.float64)[:subjects]
    parameters: list[Tensor] = [nn.Parameter(torch.zeros_like(t)) for t in drawn(source, subjects)]
    unused = nn.Parameter(torch.zeros(subjects, 2, dtype=torch.float64))
    for parameter, gradient in zip(parameters, drawn(source, subjects), strict=True):
        parameter.grad = gradient * sizes.view(-1, *[1] * (gradient.dim() - 1))
    expected = []
    for s in range(subjects):
        own = [nn.Parameter(torch.zeros_like(parameter[s])) for parameter in parameters]
        for mine, parameter in zip(own, parameters, strict=True):
            assert parameter.grad is not None
            mine.grad = parameter.grad[s].clone()
        norm = nn.utils.clip_grad_norm_(own, limit)
        expected.append((norm, [mine.grad for mine in own]))
    norms = gradient_norms([*parameters, unused], packed=True)
    assert norms.shape == (subjects,)
    clip_gradients([*parameters, unused], norms, [limit] * len(norms))
    assert unused.grad is None
    for s, (norm, gradients) in enumerate(expected):
        assert close(norms[s], norm)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            assert parameter.grad is not None
            assert gradient is not None
            assert close(parameter.grad[s], gradient)


def test_unpacked_norm_is_one_over_everything(source: torch.Generator) -> None:
    """DreamBooth's tensors have no subject axis: their first one must not be taken for it."""
    parameters: list[Tensor] = [nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(5))]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=source)
    twins = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    for twin, parameter in zip(twins, parameters, strict=True):
        assert parameter.grad is not None
        twin.grad = parameter.grad.clone()
    expected = nn.utils.clip_grad_norm_(twins, 0.1)
    norms = gradient_norms(parameters, packed=False)
    assert norms.shape == (1,)
    assert norms[0] == pytest.approx(float(expected), rel=1e-6)
    clip_gradients(parameters, norms, [0.1] * len(norms))
    for twin, parameter in zip(twins, parameters, strict=True):
        torch.testing.assert_close(parameter.grad, twin.grad)


def test_not_finite_gradients_show_in_the_norm_of_their_subject_only() -> None:
    parameter = nn.Parameter(torch.zeros(3, 2))
    parameter.grad = torch.tensor([[1.0, 1.0], [float("nan"), 0.0], [float("inf"), 0.0]])
    assert gradient_norms([parameter], packed=True).isfinite().tolist() == [True, False, False]
