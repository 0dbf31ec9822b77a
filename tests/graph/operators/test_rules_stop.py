"""Where the condition of a rule does not hold the BatchNorm stays, and its reason says why."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import error, in_eval, randomise
from torch import Tensor, nn

import normswap as ns
from normswap.passes import Fold, Freeze

Operator = Callable[..., Tensor]


class Upstream(nn.Module):
    """conv, the operator, bn; the operator may also take the value of another conv."""

    def __init__(self, operator: Operator, channels: int = 4) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.bn, self.operator = nn.BatchNorm2d(channels), operator

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.operator(self, self.conv(x), self.other(x)))


class Downstream(nn.Module):
    """bn, the operator, conv."""

    def __init__(self, operator: Operator, conv: nn.Module | None = None) -> None:
        super().__init__()
        self.bn, self.operator = nn.BatchNorm2d(3), operator
        self.conv = nn.Conv2d(3, 4, 1) if conv is None else conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.operator(self, self.bn(x)))


def reason(model: nn.Module) -> str:
    """Why `bn`, or its shift, stays; the fold computes the same."""
    randomise(model.double())
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    plan = ns.plan(model, Fold(), inputs=x)
    assert error(in_eval(plan.apply(model), x), in_eval(model, x)) <= 1e-10
    (stays,) = (e.reason for e in plan.edits if e.effect == "leaves" and e.site == "bn")
    return stays


STOPS_UPSTREAM: dict[str, Operator] = {
    "zero padding (pad)": lambda m, a, b: F.pad(a, (1, 1)),
    "padding that is not 0": lambda m, a, b: F.pad(a, (1, 1), value=1.0),
    "zero padding (avg_pool2d)": lambda m, a, b: F.avg_pool2d(a, 2, padding=1),
    "(avg_pool2d)": lambda m, a, b: F.avg_pool2d(a, 2, divisor_override=3),
    "two channels of it come from one (expand)": lambda m, a, b: a.mean(1, keepdim=True).expand(
        -1, 4, -1, -1
    ),
    "one number for several channels": lambda m, a, b: a + b[:, :1],
    "a cast to torch.float64": lambda m, a, b: a.float().double(),
    "a number that may depend on the size is added between them (add)": lambda m, a, b: (
        a + a.shape[-1]
    ),
    "a tensor of integers is added between them (add)": lambda m, a, b: a + (b > 0),
    "a tensor of integers is added between them (sub)": lambda m, a, b: a - torch.arange(4),
    "both of its factors carry the affine (mul)": lambda m, a, b: a * a,
    "its shift would be multiplied (mul)": lambda m, a, b: a * b,
    "multiplied (div)": lambda m, a, b: a / (b.sigmoid() + 1),
    "reciprocal": lambda m, a, b: 1 / (a.square() + 1),
    "relu": lambda m, a, b: a.relu(),
    "softmax": lambda m, a, b: a.softmax(1),
    "a product without softmax": lambda m, a, b: a @ b,
    "an index that is computed": lambda m, a, b: a[:, b[0, :, 0, 0].argsort()],
    "how often may depend on the size (sum)": lambda m, a, b: a.sum((2, 3), keepdim=True),
    "its shift is added to zeros (index_add)": lambda m, a, b: torch.zeros_like(a).index_add(
        0, b[:, 0, 0, 0].argsort(), a
    ),
    "the rows that it adds up are its channels": lambda m, a, b: b.index_add(
        1, b[0, :, 0, 0].argsort(), a
    ),
    "a scaled sum over rows": lambda m, a, b: b.index_add(0, b[:, 0, 0, 0].argsort(), a, alpha=2),
    "(repeat_interleave)": lambda m, a, b: a.repeat_interleave(2, 1)[:, :4],
    "another axis": lambda m, a, b: a.transpose(1, 3),
}


@pytest.mark.parametrize("why", STOPS_UPSTREAM)
def test_an_operator_before_it_stops_a_batch_norm(why: str) -> None:
    assert why in reason(Upstream(STOPS_UPSTREAM[why]))


@pytest.mark.parametrize("divisor", ["height", "positions"])
def test_a_number_computed_from_the_size_stops_a_shift(divisor: str) -> None:
    """The captured graph has that of the example."""

    def divided(m: Any, a: Tensor, b: Tensor) -> Tensor:
        return a / (a.shape[-2] if divisor == "height" else a[0, 0].numel())

    model = Upstream(divided)
    assert "its shift meets a number that may depend on the size" in reason(model)
    folded = ns.fold(model, torch.randn(1, 3, 4, 4, dtype=torch.float64))
    larger = torch.randn(1, 3, 6, 5, dtype=torch.float64)
    assert error(in_eval(folded, larger), in_eval(model, larger)) <= 1e-10


@pytest.mark.parametrize("between", [nn.BatchNorm2d(4), nn.PReLU(4), nn.GroupNorm(2, 4)])
def test_a_sum_over_as_many_positions_as_channels_stops_a_shift(between: nn.Module) -> None:
    """The gains of what comes before it are as many, and say nothing of the axis."""
    model = Upstream(lambda m, a, b: between(a).sum(-1, keepdim=True))
    model.between = between
    randomise(model.double())
    folded = ns.fold(model, torch.randn(2, 3, 4, 4, dtype=torch.float64))
    wider = torch.randn(2, 3, 4, 7, dtype=torch.float64)
    assert error(in_eval(folded, wider), in_eval(model, wider)) <= 1e-10


@pytest.mark.parametrize("numbers", [{"alpha": 2}, {"beta": 0.5}])
def test_a_scaled_matrix_product_stops_a_batch_norm(numbers: dict[str, float]) -> None:
    def product(m: Any, a: Tensor, b: Tensor) -> Tensor:
        rows = a.permute(0, 2, 3, 1).flatten(0, 2)
        rows = torch.addmm(m.weight[0], rows, m.weight, **numbers)
        return rows.view(2, 4, 4, 4).permute(0, 3, 1, 2)

    assert "scaled matrix product" in reason(Upstream(product))


@pytest.mark.parametrize(
    ("operator", "conv", "why"),
    [
        (lambda m, a: a, nn.Conv2d(3, 4, 3, padding=1), "zero padding of a convolution"),
        (lambda m, a: a, nn.Conv2d(3, 4, 2, padding="same"), "zero padding of a convolution"),
        (lambda m, a: a, nn.ConvTranspose2d(3, 4, 2), "transposed convolution"),
        (lambda m, a: a.flatten(1)[..., None, None], nn.Conv2d(48, 4, 1), None),
        (lambda m, a: torch.cat([a, a * a], 1), nn.Conv2d(6, 4, 1), "both of its factors"),
        (lambda m, a: a.mean(1, keepdim=True), nn.Conv2d(1, 4, 1), "averages over the axis"),
        (lambda m, a: a.sum(1, keepdim=True), nn.Conv2d(1, 4, 1), "sum"),
        (lambda m, a: F.unfold(a, 2, padding=1)[..., None], nn.Conv2d(12, 4, 1), "im2col"),
    ],
)
def test_an_operator_after_it_stops_a_batch_norm(
    operator: Operator, conv: nn.Module, why: str | None
) -> None:
    model = Downstream(operator, conv)
    if why is None:  # every position has its weights: nothing is in the way
        randomise(model.double())
        x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
        folded = ns.fold(model, x)
        assert isinstance(folded.bn, nn.Identity)
        assert error(in_eval(folded, x), in_eval(model, x)) <= 1e-10
    else:
        assert why in reason(model)


@pytest.mark.parametrize("channel", [0, 3])
def test_a_maximum_passes_positive_scales_alone(channel: int) -> None:
    model = Upstream(lambda m, a, b: F.max_pool2d(a, 2))
    randomise(model.double())
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert isinstance(ns.fold(model, x).bn, nn.Identity)
    with torch.no_grad():
        model.bn.weight[channel] *= -1
    (stays,) = (e.reason for e in ns.plan(model, Fold(), inputs=x).edits)
    assert "maximum" in stays


class Written(Upstream):
    """conv; its output is used, then written into, then normalized."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.conv(x)
        gate = a.sigmoid()
        return self.bn(a.add_(self.other(x))) * gate


def test_an_operator_that_writes_into_a_value_that_others_see_stops_a_batch_norm() -> None:
    why = reason(Written(lambda m, a, b: a))
    assert "writes into a value that others see" in why


class PaddedToSize(nn.Module):
    """Half the size and back, padded with zeros where the size was odd, then bn."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 2, stride=2), nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.down(x).relu())
        return self.bn(F.pad(y, (0, x.shape[3] - y.shape[3], 0, x.shape[2] - y.shape[2])))


def test_a_padding_that_only_another_size_needs_stops_the_shift() -> None:
    model = randomise(PaddedToSize().double())
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    folded = ns.fold(model, x[:, :, :4, :6])
    assert error(in_eval(folded, x), in_eval(model, x)) <= 1e-10


class Remembering(nn.Module):
    """A product plus a buffer that gets smaller with every call, then bn."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bn = nn.Parameter(torch.randn(3, 4)), nn.BatchNorm1d(4)
        self.register_buffer("offset", torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x @ self.weight + self.offset.mul_(0.5))


def test_a_buffer_that_every_call_changes_folds_in_nothing() -> None:
    model, x = randomise(Remembering().double()), torch.randn(5, 3, dtype=torch.float64)
    folded = ns.fold(model, x)
    for _ in range(3):
        assert error(in_eval(folded, x), in_eval(model, x)) <= 1e-10


def test_dropout_that_is_always_on_stops_a_batch_norm() -> None:
    model = Upstream(lambda m, a, b: F.dropout(a, 0.5, True))
    randomise(model)
    (stays,) = (e.reason for e in ns.plan(model, Fold(), inputs=torch.randn(2, 3, 4, 4)).edits)
    assert "dropout" in stays


def test_dropout_that_is_active_in_training_stops_tune_mode() -> None:
    model = Upstream(lambda m, a, b: F.dropout(a, 0.5, m.training))
    x = torch.randn(2, 3, 4, 4)
    randomise(model)
    assert isinstance(ns.fold(model, x).bn, nn.Identity)
    plan = ns.plan(model, Freeze(mode="tune"), inputs=x)
    assert any("dropout" in each.reason for each in (*plan.left, *plan.edits))


def test_stochastic_depth_passes_in_eval_mode_and_stops_tune_mode() -> None:
    def drop_path(m: Any, a: Tensor, b: Tensor) -> Tensor:
        if not m.training:
            return a
        return a * torch.empty(len(a), 1, 1, 1).bernoulli_(0.5).div_(0.5)

    model = Upstream(drop_path)
    x = torch.randn(2, 3, 4, 4)
    randomise(model)
    assert isinstance(ns.fold(model, x).bn, nn.Identity)
    plan = ns.plan(model, Freeze(mode="tune"), inputs=x)
    assert any("in training" in each.reason for each in (*plan.left, *plan.edits))
