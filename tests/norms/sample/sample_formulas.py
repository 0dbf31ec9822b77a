"""The published formulas of the sample family, in float64 and with torch's own reductions.

A formula takes x (N, C, ...) and the parameters of the module by their names; nothing of normswap
is used.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import normswap as ns

EPS = 1e-5
Parameters = dict[str, Tensor]


def column(vector: Tensor, x: Tensor) -> Tensor:
    """(C,) against (N, C, ...)."""
    return vector.view(1, -1, *[1] * (x.dim() - 2))


def affine(x: Tensor, p: Parameters) -> Tensor:
    if "weight" in p:
        x = x * column(p["weight"], x)
    return x + column(p["bias"], x) if "bias" in p else x


def mean_over(x: Tensor, axes: list[int]) -> Tensor:
    return x.mean(axes, keepdim=True) if axes else x


def positions(x: Tensor) -> list[int]:
    return list(range(2, x.dim()))


def centered(axes: Callable[[Tensor], list[int]]) -> Callable[[Tensor, Parameters], Tensor]:
    """(x - mean) / sqrt(variance + eps): layer, instance and positional normalization."""

    def formula(x: Tensor, p: Parameters) -> Tensor:
        apart = x - mean_over(x, axes(x))
        return affine(apart / torch.sqrt(mean_over(apart**2, axes(x)) + EPS), p)

    return formula


def group(x: Tensor, p: Parameters) -> Tensor:
    """Wu & He 2018, equations 1 to 3; groups of two channels."""
    parts = [centered(lambda g: list(range(1, g.dim())))(part, {}) for part in x.split(2, 1)]
    return affine(torch.cat(parts, 1), p)


def rms(axes: Callable[[Tensor], list[int]]) -> Callable[[Tensor, Parameters], Tensor]:
    """Zhang & Sennrich 2019, equation 4."""
    return lambda x, p: affine(x / torch.sqrt(mean_over(x**2, axes(x)) + EPS), p)


def filter_response(x: Tensor, p: Parameters) -> Tensor:
    """Singh & Krishnan 2020, equations 1 to 4."""
    eps = EPS + (p["eps_l"].abs() if "eps_l" in p else 0)
    y = affine(x / torch.sqrt(mean_over(x**2, positions(x)) + eps), p)
    return torch.where(y > column(p["tau"], y), y, column(p["tau"], y)) if "tau" in p else y


def global_response(residual: bool) -> Callable[[Tensor, Parameters], Tensor]:
    """Woo et al. 2023, algorithm 1."""

    def formula(x: Tensor, p: Parameters) -> Tensor:
        total = (x**2).sum(positions(x), keepdim=True) if x.dim() > 2 else x**2
        norm = torch.sqrt(total)
        return affine(x * norm / (norm.mean(1, keepdim=True) + EPS), p) + residual * x

    return formula


def local_response(size: int, alpha: float, beta: float, k: float) -> Any:
    """Krizhevsky et al. 2012, section 3.3: channel i with those from i - size / 2 on."""

    def formula(x: Tensor, p: Parameters) -> Tensor:
        outputs = []
        for channel in range(x.shape[1]):
            first = channel - size // 2
            window = range(max(first, 0), min(first + size, x.shape[1]))
            total = sum(x[:, other] ** 2 for other in window)
            outputs.append(x[:, channel] / (k + alpha / size * total) ** beta)
        return torch.stack(outputs, 1)

    return formula


@dataclass(frozen=True)
class Case:
    """A method with options, and its formula; `own`: not simply a torch module."""

    name: str
    formula: Callable[[Tensor, Parameters], Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    ranks: tuple[int, ...] = (2, 3, 4, 5)
    own: bool = True

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.options.items() if k != "eps")])

    def module(self, channels: int) -> nn.Module:
        """In float64, with random parameters."""
        module = ns.create(self.name, channels, **self.options).double()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        return module

    def expected(self, x: Tensor, module: nn.Module) -> Tensor:
        return self.formula(x, dict(module.named_parameters()))


def _all(x: Tensor) -> list[int]:
    return list(range(1, x.dim()))


def _channels(x: Tensor) -> list[int]:
    return [1]


E5: dict[str, Any] = {"eps": EPS}
WIDE = {"size": 4, "alpha": 0.7, "beta": 0.6, "k": 1.5}
CASES = [
    Case("group_norm", group, E5 | {"channels_per_group": 2}, own=False),
    Case("layer_norm", centered(_all), E5, own=False),
    Case("layer_norm", centered(_channels), E5 | {"per_position": True}),
    Case("instance_norm", centered(positions), E5, ranks=(3, 4, 5)),
    Case("instance_norm", centered(positions), E5 | {"affine": False}, ranks=(3, 4, 5)),
    Case("positional_norm", centered(_channels), E5),
    Case("positional_norm", centered(_channels), E5 | {"affine": True}),
    Case("rms_norm", rms(_all), E5),
    Case("rms_norm", rms(_all), E5 | {"bias": True}),
    Case("rms_norm", rms(_all), E5 | {"affine": False}),
    Case("rms_norm", rms(_channels), E5 | {"per_position": True, "bias": True}),
    Case("filter_response_norm", filter_response, E5),
    Case("filter_response_norm", filter_response, E5 | {"tlu": False}),
    Case("filter_response_norm", filter_response, E5 | {"learnable_eps": True}),
    Case("filter_response_norm", filter_response, E5 | {"affine": False}),
    Case("global_response_norm", global_response(True), E5),
    Case("global_response_norm", global_response(False), E5 | {"residual": False}),
    Case("local_response_norm", local_response(5, 1e-4, 0.75, 1.0)),
    Case("local_response_norm", local_response(4, 0.7, 0.6, 1.5), WIDE),
    Case("local_response_norm", local_response(3, 0.7, 0.6, 1.5), WIDE | {"size": 3}),
]
