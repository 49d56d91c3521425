"""Learning rates, clipping and the optimizer for tensors with a subject axis.

Between the gradients of `train.py` and the weights. Invariant: what happens to a subject's slice of
a packed tensor depends on that slice, its gradient and its own learning rate only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from disttrain.config import OptimSettings, RunConfig
from disttrain.methods.base import ParameterGroup


def learning_rate_factor(
    rule: str, data_parallel: int, batch_size: int, accumulation: int
) -> float:
    """What the base learning rate is multiplied by for samples per update N: N, sqrt(N) or 1.

    Linear: Goyal et al. 2017, and the original textual inversion code's `scale_lr`. Square root:
    Krizhevsky 2014.
    """
    samples = data_parallel * batch_size * accumulation
    return {"linear": float(samples), "sqrt": math.sqrt(samples), "none": 1.0}[rule]


def describe_learning_rate(config: RunConfig, data_parallel: int) -> dict[str, Any]:
    """The derivation of step and learning rate, for the terminal and `environment.json`."""
    batch, accumulation = config.data.batch_size, config.train.gradient_accumulation_steps
    factor = learning_rate_factor(config.optim.scale_lr, data_parallel, batch, accumulation)
    rule = config.optim.scale_lr
    many = "process" if data_parallel == 1 else "processes"
    parts = f"{data_parallel} {many} x {batch} batch x {accumulation} accumulation"
    how = {"linear": parts, "sqrt": f"sqrt({parts})", "none": "1 (scale_lr: none)"}[rule]
    rate = config.optim.learning_rate * factor
    pictures = data_parallel * batch * accumulation
    return {
        "base": config.optim.learning_rate,
        "rule": rule,
        "data_parallel": data_parallel,
        "batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "factor": factor,
        "learning_rate": rate,
        "text": f"learning rate {rate:g} = {config.optim.learning_rate:g} x {how}",
        "step": f"optimizer step of {pictures} pictures = {parts}",
    }


def schedule_factor(optim: OptimSettings, step: int, max_steps: int) -> float:
    """Share of the full learning rate at update `step`, counted from 0, on any world size."""
    warmup = optim.lr_warmup_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if optim.lr_schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, max_steps - warmup)
    return 1.0 - done if optim.lr_schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


class PackedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) over tensors `[S, ...]` with a step count per subject.

    For S = 1 it is `torch.optim.AdamW`. A group's `lr` and `weight_decay` are numbers or tensors
    `[S]`. Work per step is a few calls per tensor, whatever S.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        defaults = {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(list(groups), defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every tensor that has a gradient."""
        assert closure is None, "this optimizer does not evaluate the model itself"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    @staticmethod
    def blank(parameter: Tensor) -> dict[str, Tensor]:
        """State of a tensor `[S, ...]` before its first step."""
        steps = torch.zeros(parameter.shape[0], dtype=torch.float64, device=parameter.device)
        moments = (torch.zeros_like(parameter), torch.zeros_like(parameter))
        return dict(zip(("step", "exp_avg", "exp_avg_sq"), (steps, *moments), strict=True))

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        subjects = parameter.shape[0]
        state = self.state[parameter]
        if not state:
            state.update(self.blank(parameter))
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        shape = (subjects,) + (1,) * (parameter.dim() - 1)
        device = parameter.device
        rate, decay = (
            torch.as_tensor(group[key], dtype=torch.float64, device=device).expand(subjects)
            for key in ("lr", "weight_decay")
        )
        correction1 = 1 - torch.pow(beta1, state["step"])
        correction2 = 1 - torch.pow(beta2, state["step"])
        keep = (1 - rate * decay).to(parameter.dtype).view(shape)
        size = (rate / correction1).to(parameter.dtype).view(shape)
        spread = correction2.sqrt().to(parameter.dtype).view(shape)
        denominator = (state["exp_avg_sq"].sqrt() / spread).add_(group["eps"])
        parameter.mul_(keep).sub_(state["exp_avg"] / denominator * size)


def make_optimizer(config: RunConfig, groups: list[ParameterGroup]) -> torch.optim.Optimizer:
    """The configured optimizer over a method's groups; `set_rates` comes before each step."""
    optim = config.optim
    settings = [{"params": list(group.parameters.values()), "part": group.name} for group in groups]
    betas = (optim.adam_beta1, optim.adam_beta2)
    if config.packable:
        return PackedAdamW(settings, betas, optim.adam_epsilon, 0.0)
    return torch.optim.AdamW(settings, 0.0, betas, optim.adam_epsilon, 0.0)


def set_rates(
    optimizer: torch.optim.Optimizer, members: Sequence[RunConfig], factors: Sequence[float]
) -> None:
    """Give every group each member's base rate times its factor, and its weight decay."""
    for group in optimizer.param_groups:
        rates = [
            member.optim.rate_of(group["part"]) * factor
            for member, factor in zip(members, factors, strict=True)
        ]
        decays = [member.weight_decay for member in members]
        if len(members) == 1:
            group["lr"], group["weight_decay"] = rates[0], decays[0]
        else:
            group["lr"] = torch.tensor(rates, dtype=torch.float64)
            group["weight_decay"] = torch.tensor(decays, dtype=torch.float64)


def gradient_norms(parameters: list[Tensor], packed: bool) -> Tensor:
    """Euclidean norm of each subject's gradient over all its tensors: `[S]`, or `[1]` unpacked."""
    squares = [
        gradient.double().pow(2).flatten(1 if packed else 0).sum(dim=-1).view(-1)
        for gradient in (parameter.grad for parameter in parameters)
        if gradient is not None
    ]
    return torch.stack(squares).sum(dim=0).sqrt()


def clip_gradients(parameters: list[Tensor], norms: Tensor, limits: Sequence[float]) -> None:
    """Scale each subject's gradient to a norm of at most its limit, given the `norms` it has.

    A limit of 0 means none.
    """
    factors = clip_factors(norms, limits)
    for parameter in parameters:
        if parameter.grad is not None:
            shape = (-1,) + (1,) * (parameter.dim() - 1) if len(factors) > 1 else ()
            factor = factors.view(shape) if shape else factors[0]
            parameter.grad.mul_(factor.to(parameter.grad.dtype))


def clip_factors(norms: Tensor, limits: Sequence[float]) -> Tensor:
    """What brings gradients of these norms `[S]` to at most their limits; 0 means no limit."""
    bounds = norms.new_tensor([limit or math.inf for limit in limits])
    return (bounds / (norms + 1e-6)).clamp(max=1.0)
