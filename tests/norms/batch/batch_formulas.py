"""The published formulas of the batch family, written out per channel in float64.

A formula takes x (N, C, ...), the state of the module by its state-dict keys, and what it was made
with; it returns y and the running statistics afterwards. Nothing of normswap is used.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normswap.norms.batch.conditional import conditioned

EPS, MOMENTUM = 1e-5, 0.1
State = dict[str, Tensor]
Formula = Callable[[Tensor, State, bool], tuple[Tensor, State]]


def column(vector: Tensor, x: Tensor) -> Tensor:
    """(C,) against (N, C, ...)."""
    return vector.view(1, -1, *[1] * (x.dim() - 2))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.transpose(0, 1).flatten(1)
    return rows.mean(1), rows.var(1, correction=0)


def moved(state: State, **batch: Tensor) -> State:
    return {k: (1 - MOMENTUM) * state[k] + MOMENTUM * v.detach() for k, v in batch.items()}


def unbiased(var: Tensor, x: Tensor) -> Tensor:
    count = x.numel() // x.shape[1]
    return var * count / (count - 1)


def with_moments(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Weight and bias are (C,), or of x's rank."""
    weight, bias = (each if each.dim() > 1 else column(each, x) for each in (weight, bias))
    return weight * (x - column(mean, x)) / column(torch.sqrt(var + EPS), x) + bias


def batch_norm(x: Tensor, state: State, training: bool) -> tuple[Tensor, State]:
    mean, var = moments(x) if training else (state["running_mean"], state["running_var"])
    y = with_moments(x, mean, var, state["weight"], state["bias"])
    if not training:
        return y, {}
    return y, moved(state, running_mean=mean, running_var=unbiased(var, x))


def mean_only(x: Tensor, state: State, training: bool) -> tuple[Tensor, State]:
    mean = moments(x)[0] if training else state["running_mean"]
    y = x - column(mean, x) + column(state["bias"], x)
    return y, moved(state, running_mean=mean) if training else {}


def renorm(x: Tensor, state: State, training: bool) -> tuple[Tensor, State]:
    if not training:
        return batch_norm(x, state, False)
    mean, var = moments(x)
    sigma = torch.sqrt(state["running_var"] + EPS)
    r = (torch.sqrt(var + EPS) / sigma).detach().clamp(1 / 1.5, 1.5)
    d = ((mean - state["running_mean"]) / sigma).detach().clamp(-0.5, 0.5)
    normalized = (x - column(mean, x)) / column(torch.sqrt(var + EPS), x)
    y = column(state["weight"], x) * (normalized * column(r, x) + column(d, x))
    running = moved(state, running_mean=mean, running_var=unbiased(var, x))
    return y + column(state["bias"], x), running


def ghost(x: Tensor, state: State, training: bool) -> tuple[Tensor, State]:
    if not training:
        return batch_norm(x, state, False)
    parts = [x[start : start + 2] for start in range(0, len(x), 2)]
    taken = [moments(part) for part in parts]
    outputs = [
        with_moments(part, mean, var, state["weight"], state["bias"])
        for part, (mean, var) in zip(parts, taken, strict=True)
    ]
    k = len(parts)
    mean, var = ((1 - MOMENTUM) ** k * state[key] for key in ("running_mean", "running_var"))
    for i, (part, (m, v)) in enumerate(zip(parts, taken, strict=True), start=1):
        share = (1 - MOMENTUM) ** (k - i) * MOMENTUM
        mean, var = mean + share * m.detach(), var + share * unbiased(v, part).detach()
    return torch.cat(outputs), {"running_mean": mean, "running_var": var}


def l1(x: Tensor, state: State, training: bool) -> tuple[Tensor, State]:
    mean, sigma = state["running_mean"], state["running_deviation"]
    if training:
        mean = moments(x)[0]
        away = (x - column(mean, x)).abs().transpose(0, 1).flatten(1)
        sigma = (torch.pi / 2) ** 0.5 * away.mean(1)
    y = column(state["weight"], x) * (x - column(mean, x)) / column(sigma + EPS, x)
    y = y + column(state["bias"], x)
    return y, moved(state, running_mean=mean, running_deviation=sigma) if training else {}


def condition(samples: int, like: Tensor) -> Tensor:
    """Three numbers for each sample."""
    return torch.sin(torch.arange(3.0 * samples).view(samples, 3)).to(like.dtype)


def conditional(x: Tensor, state: State, training: bool) -> tuple[Tensor, State]:
    given = condition(len(x), state["weight"])
    weight = state["weight"] + given @ state["weight_delta.weight"].T
    bias = state["bias"] + given @ state["bias_delta.weight"].T
    weight, bias = (each.view(*each.shape, *[1] * (x.dim() - 2)) for each in (weight, bias))
    return batch_norm(x, {**state, "weight": weight, "bias": bias}, training)


def adaptive(x: Tensor, state: State, training: bool) -> tuple[Tensor, State]:
    """In the second domain, "night"."""
    own = {k: state[f"others.night.{k}"] for k in ("running_mean", "running_var")}
    y, running = batch_norm(x, {**state, **own}, training)
    first = {k: state[k] for k in own}  # stay
    return y, {f"others.night.{k}": v for k, v in running.items()} | first if running else {}


@dataclass(frozen=True)
class Case:
    """A method, what it is made with, and its formula.

    `pure`: options with which its output depends on nothing but its input and parameters, for
    numerical derivatives.
    """

    method: str
    formula: Formula
    options: dict[str, Any] = field(default_factory=dict)
    pure: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.method

    def call(self, module: nn.Module, x: Tensor) -> Tensor:
        """The module on x, with the condition or in the domain of the formula."""
        context: Any = nullcontext()
        if self.method == "conditional_batch_norm":
            context = conditioned(module, condition(len(x), module.running_mean))
        with context:
            named = ("night",) if self.method == "adaptive_batch_norm" else ()
            y: Tensor = module(x, *named)
        return y


CASES = [
    Case("batch_norm", batch_norm),
    Case("mean_only_batch_norm", mean_only),
    Case(
        "batch_renorm",
        renorm,
        {"r_max": 1.5, "d_max": 0.5, "schedule": False, "momentum": MOMENTUM},
        {"r_max": 1.0, "d_max": 0.0},
    ),
    Case("ghost_batch_norm", ghost, {"ghost_batch_size": 2}),
    Case("l1_batch_norm", l1),
    Case("conditional_batch_norm", conditional, {"num_conditions": 3}),
    Case("adaptive_batch_norm", adaptive, {"domains": ("day", "night")}),
]
