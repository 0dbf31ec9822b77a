"""Drawn networks compute the same without what is said to be redundant, where eps is tiny."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import error, in_eval
from torch import Tensor, nn

from normswap.core.errors import Unsupported
from normswap.graph.capture import capture
from normswap.graph.redundancies import Redundancies
from normswap.graph.sites import find_sites

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(2, 4, 8, dtype=torch.float64, generator=GENERATOR)
Step = Callable[["Drawn", Tensor, Tensor], Tensor]


class Drawn(nn.Module):
    """A normalization of (N, 4, 8), what is done with it beside the input, and what ends it."""

    def __init__(self, steps: list[Step], end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(8, eps=1e-30, elementwise_affine=False)
        self.steps, self.end = steps, end
        shapes = {"channels": (8, 8), "tokens": (4, 4), "kernel": (8, 8, 3), "gain": (8,)}
        for name, shape in shapes.items():
            weight = torch.randn(shape, dtype=torch.float64, generator=GENERATOR)
            self.register_parameter(name, nn.Parameter(weight))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        for step in self.steps:
            y = step(self, y, x)
        return self.end(y)


def written(base: Tensor, *, part: Tensor, by: Tensor | float) -> Tensor:
    """`base`, of which a `part`, a view, is multiplied in place."""
    part.mul_(by)
    return base


STEPS: dict[str, Step] = {
    "linear": lambda m, y, _: F.linear(y, m.channels),
    "matmul": lambda m, y, _: y @ m.channels,
    "einsum": lambda m, y, _: torch.einsum("btc,dc->btd", y, m.channels),
    "tokens mixed": lambda m, y, _: m.tokens @ y,
    "convolved": lambda m, y, _: F.conv1d(y.mT, m.kernel, padding=1).mT,
    "relu": lambda m, y, _: y.relu(),
    "gain": lambda m, y, _: y * m.gain,
    "gate": lambda m, y, x: y * x.sigmoid(),
    "divided": lambda m, y, x: y / (1 + x.abs()),
    "divides": lambda m, y, x: x / (1 + y.abs()),
    "other positions": lambda m, y, _: y.roll(1, 1),
    "another channel": lambda m, y, _: y + y.flip(2),
    "another position": lambda m, y, _: y + y.flip(1),
    "a residual": lambda m, y, x: y + x,
    "a constant": lambda m, y, _: y + m.gain,
    "its own branch": lambda m, y, _: y - 3 * F.linear(y, m.channels),
    "gelu": lambda m, y, _: F.gelu(y),
    "mean of channels": lambda m, y, _: y - y.mean(-1, keepdim=True),
    "mean of tokens": lambda m, y, _: y - y.mean(1, keepdim=True),
    "beside the input": lambda m, y, x: torch.cat([y[..., :4], x[..., 4:]], -1),
    "after a token": lambda m, y, x: torch.cat([x[:, :1], y[:, 1:]], 1),
    "shuffled": lambda m, y, _: y.mT.reshape(y.shape),
    "two by two": lambda m, y, _: y.reshape(-1, 2, 2, 8).transpose(1, 2).reshape(y.shape),
    "in place": lambda m, y, _: written(z := y * 1, part=z[..., :4], by=3.0),
    "a part by another": lambda m, y, x: written(z := y * 1, part=z[:, :2], by=x[:, :2]),
    "into another": lambda m, y, x: written(z := x * 1, part=z[:, :2], by=y[:, :2]),
    "a maximum": lambda m, y, _: F.max_pool1d(y, 3, 1, 1),
    "squared": lambda m, y, _: y * y,
    "attended": lambda m, y, x: (x @ x.mT).softmax(-1) @ y,
    "attends": lambda m, y, x: (y @ y.mT).softmax(-1) @ x,
}
ENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "rms": lambda y: F.rms_norm(y, (8,), eps=1e-30),
    "layer": lambda y: F.layer_norm(y, (8,), eps=1e-30),
    "heads": lambda y: F.rms_norm(y.unflatten(-1, (2, 4)), (4,), eps=1e-30),
    "whole samples": lambda y: F.layer_norm(y, (4, 8), eps=1e-30),
    "groups": lambda y: F.group_norm(y, 4, eps=1e-30),
    "pairs of tokens": lambda y: F.group_norm(y, 2, eps=1e-30),
    "over tokens": lambda y: F.rms_norm(y.mT, (4,), eps=1e-30),
    "instance": lambda y: F.instance_norm(y, eps=1e-30),
}


def is_redundant(model: nn.Module) -> bool:
    seen = capture(model, X)
    sites = find_sites(seen)
    (norm,) = (site for site in sites if site.name == "norm")
    try:
        Redundancies(seen, sites, assume_example=True).ends(norm)
    except Unsupported:
        return False
    return True


def without(model: nn.Module) -> nn.Module:
    found = copy.deepcopy(model)
    found.norm = nn.Identity()
    return found


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(list(STEPS.values())), max_size=3),
    st.sampled_from(list(ENDS.values())),
)
def test_what_is_redundant_can_be_left_out(
    steps: list[Step], end: Callable[[Tensor], Tensor]
) -> None:
    model = Drawn(steps, end)
    if is_redundant(model):
        assert error(in_eval(without(model), X), in_eval(model, X)) <= 1e-9


PASSED = {
    *("linear", "matmul", "einsum", "relu", "gain", "gate", "divided", "other positions"),
    *("another channel", "its own branch", "mean of channels", "after a token", "two by two"),
    *("in place", "a part by another", "a maximum"),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_passes_or_stops(name: str) -> None:
    model = Drawn([STEPS[name]], ENDS["rms"])
    assert is_redundant(model) == (name in PASSED)
    same = error(in_eval(without(model), X), in_eval(model, X)) <= 1e-9
    assert same >= (name in PASSED)
