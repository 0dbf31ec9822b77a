"""The published formulas of the mixed family, written out in float64 with torch's own reductions.

A formula takes x (N, C, ...), the state of the module by its state-dict keys, and whether it
trains; it returns y and the statistics of the batch, mean and unbiased variance. Nothing of
normswap is used.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

EPS, MOMENTUM = 1e-5, 0.1
State = dict[str, Tensor]
Formula = Callable[[Tensor, State, bool], Tensor]


def column(vector: Tensor, x: Tensor) -> Tensor:
    """(C,) against (N, C, ...)."""
    return vector.view(1, -1, *[1] * (x.dim() - 2))


def over(x: Tensor, *axes: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over `axes` and all positions, as they broadcast to x."""
    flat = x.reshape(*x.shape[:2], -1)
    var, mean = torch.var_mean(flat, (*axes, 2), correction=0, keepdim=True)
    return tuple(each.view(*each.shape[:2], *[1] * (x.dim() - 2)) for each in (mean, var))


def of_batch(x: Tensor, state: State, training: bool) -> tuple[Tensor, Tensor]:
    if training:
        return over(x, 0)
    mean = state.get("running_mean", torch.zeros_like(state["running_var"]))
    return column(mean, x), column(state["running_var"], x)


def batch_instance(x: Tensor, state: State, training: bool) -> Tensor:
    """Equations 1 to 3."""
    (mu_b, var_b), (mu_i, var_i) = of_batch(x, state, training), over(x)
    x_b = (x - mu_b) / torch.sqrt(var_b + EPS)
    x_i = (x - mu_i) / torch.sqrt(var_i + EPS)
    gamma, beta, rho = (column(state[key], x) for key in ("weight", "bias", "gate"))
    return (rho * x_b + (1 - rho) * x_i) * gamma + beta


def switchable(x: Tensor, state: State, training: bool) -> Tensor:
    """Equations 3 to 5."""
    moments = [over(x), over(x, 1), of_batch(x, state, training)]
    shares = [
        torch.exp(w) / torch.exp(w).sum() for w in (state["mean_weight"], state["var_weight"])
    ]
    mean, var = (
        sum(share[k] * moments[k][which] for k in range(3)) for which, share in enumerate(shares)
    )
    gamma, beta = column(state["weight"], x), column(state["bias"], x)
    return gamma * (x - mean) / torch.sqrt(var + EPS) + beta


def s0(x: Tensor, state: State, training: bool) -> Tensor:
    """Table 1; groups of two channels."""
    groups = [x[:, first : first + 2] for first in range(0, x.shape[1], 2)]
    deviations = [
        torch.sqrt(over(g, 1)[1] + EPS).expand(-1, 2, *[-1] * (x.dim() - 2)) for g in groups
    ]
    gamma, beta, v = (column(state[key], x) for key in ("weight", "bias", "v"))
    return x / (1 + torch.exp(-v * x)) / torch.cat(deviations, 1) * gamma + beta


def b0(x: Tensor, state: State, training: bool) -> Tensor:
    """Table 1."""
    gamma, beta, v = (column(state[key], x) for key in ("weight", "bias", "v"))
    first = torch.sqrt(of_batch(x, state, training)[1] + EPS)
    second = v * x + torch.sqrt(over(x)[1] + EPS)
    return x / torch.where(first > second, first, second) * gamma + beta


@dataclass(frozen=True)
class Case:
    """A method, what it is made with, and its formula."""

    method: str
    formula: Formula
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.method


CASES = [
    Case("batch_instance_norm", batch_instance),
    Case("switchable_norm", switchable),
    Case("evonorm_s0", s0, {"channels_per_group": 2}),
    Case("evonorm_b0", b0),
]
