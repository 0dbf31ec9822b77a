"""Folds through products written out, graph convolutions and sums, beside the unmodified model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import batch_norms, error, in_eval, randomise
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

import normswap as ns
from normswap.norms.pointwise.channel_affine import ChannelShift
from normswap.passes import Fold
from normswap.passes.plan import Plan

Operator = Callable[[Any, Tensor], Tensor]
# Of (N, L, 4) = (2, 5, 4): an image of 2 x 2 for the last.
PRODUCTS: dict[str, Operator] = {
    "w @ x": lambda m, x: m.w @ x.transpose(1, 2),
    "w.t() @ x": lambda m, x: m.v.t() @ x.transpose(1, 2),
    "x @ v": lambda m, x: (x @ m.v).transpose(1, 2),
    "einsum": lambda m, x: torch.einsum("oc,nlc->nol", m.w, x),
    "einsum ...": lambda m, x: torch.einsum("oc,...lc->...ol", m.w, x),
    "einsum implicit": lambda m, x: torch.einsum("nlc,co", x, m.v).mT,
    "unfold": lambda m, x: m.k.view(6, -1) @ F.unfold(x.mT[..., None], (3, 1)),
}


class Product(nn.Module):
    """A product with a constant, and a BatchNorm of its 6 channels."""

    def __init__(self, operator: Operator) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4, 6))
        self.k, self.linear = nn.Parameter(torch.randn(6, 4, 3, 1)), nn.Linear(4, 6)
        self.bn, self.operator = nn.BatchNorm1d(6), operator

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.operator(self, x))


X = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def product(operator: Operator) -> nn.Module:
    torch.manual_seed(0)
    return randomise(Product(operator).double()).eval()


@pytest.mark.parametrize("operator", PRODUCTS)
def test_a_product_with_a_constant_folds_in_a_scale(operator: str) -> None:
    model = product(PRODUCTS[operator])
    with torch.no_grad():
        model.bn.running_mean.zero_()
        model.bn.bias.zero_()
    folded = ns.fold(model, X)
    assert batch_norms(folded) == []
    assert error(in_eval(folded, X), in_eval(model, X)) <= 1e-12


@pytest.mark.parametrize("operator", PRODUCTS)
def test_a_shift_that_a_product_has_no_place_for_is_added_behind_it(operator: str) -> None:
    model = product(PRODUCTS[operator])
    decided = ns.plan(model, Fold(), inputs=X)
    assert [str(edit) for edit in decided.edits][-1] == "one shift per channel"
    assert not decided.left
    folded = decided.apply(model)
    assert type(folded.bn) is ChannelShift
    assert error(in_eval(folded, X), in_eval(model, X)) <= 1e-12
    again = Plan.from_json(decided.to_json()).apply(model, inputs=X)
    assert torch.equal(in_eval(again, X), in_eval(folded, X))


def test_what_stays_of_the_shift_is_seen_by_those_around() -> None:
    """No other affine passes a site whose shift stays, nor does it take one up."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.first = nn.Parameter(torch.randn(6, 4)), nn.BatchNorm1d(6)
            self.second, self.act = nn.BatchNorm1d(6, affine=False), nn.Linear(5, 5)
            self.third = nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.second(self.first(self.w @ x.mT))
            return self.third(self.act(y)) + y.relu()

    torch.manual_seed(0)
    model = randomise(Two().double()).eval()
    folded = ns.fold(model, X)
    assert error(in_eval(folded, X), in_eval(model, X)) <= 1e-12


def test_a_shift_that_stays_is_added_in_onnx(tmp_path: Path) -> None:
    model = product(PRODUCTS["w @ x"]).float()
    report = ns.export(ns.fold(model, X.float()), X.float(), tmp_path / "model.onnx")
    assert report.passed
    assert not {"BatchNormalization", "Mul"} & report.operators.keys()


def test_the_activation_of_a_batch_norm_comes_after_the_shift() -> None:
    model = product(PRODUCTS["w @ x"])
    model.bn = randomise(BatchNormAct2d(6).double()).eval()
    model.operator = lambda m, x: (m.w @ x.mT)[..., None]
    folded = ns.fold(model, X)
    assert type(folded.bn.norm) is ChannelShift
    assert error(in_eval(folded, X), in_eval(model, X)) <= 1e-12


@pytest.mark.parametrize("operator", ["w @ x", "einsum"])
def test_a_constant_that_is_added_to_a_product_takes_the_shift(operator: str) -> None:
    model = product(lambda m, x: PRODUCTS[operator](m, x) + m.linear.bias[:, None])
    folded = ns.fold(model, X)
    assert batch_norms(folded) == []
    assert error(in_eval(folded, X), in_eval(model, X)) <= 1e-12


def test_positions_that_are_mixed_from_the_right_pass_an_affine() -> None:
    """The non-local block: values (N, C, L) times a transposed softmax."""

    def mixed(m: Any, x: Tensor) -> Tensor:
        attention = torch.bmm(x, x.mT).softmax(-1)
        return torch.bmm(m.linear(x).mT, attention.permute(0, 2, 1))

    model = product(mixed)
    folded = ns.fold(model, X)
    assert batch_norms(folded) == []
    assert error(in_eval(folded, X), in_eval(model, X)) <= 1e-12


class GraphConv(nn.Module):
    """Sums the rows of a node's neighbours, adds a bias; Kipf & Welling 2017 (arXiv 1609.02907)."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.linear = how, nn.Linear(4, 6, bias=False)
        self.bias, self.bn = nn.Parameter(torch.randn(6)), nn.BatchNorm1d(6)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        rows, (source, to) = self.linear(x), edges.unbind(0)
        if self.how == "index_add":
            sums = torch.zeros_like(rows).index_add(0, to, rows.index_select(0, source))
        elif self.how == "index_add_":
            sums = rows.new_zeros(rows.shape).index_add_(0, to, rows[source])
        else:
            taken = rows[source]
            index = to.view(-1, 1).expand_as(taken)
            sums = torch.zeros(len(x), 6, dtype=x.dtype).scatter_add_(0, index, taken)
        return self.bn(sums + self.bias)


@pytest.mark.parametrize("how", ["index_add", "index_add_", "scatter_add_"])
def test_a_batch_norm_folds_into_a_graph_convolution(how: str) -> None:
    model = randomise(GraphConv(how).double()).eval()
    x, edges = torch.randn(5, 4, dtype=torch.float64), torch.randint(0, 5, (2, 9))
    folded = ns.fold(model, (x, edges))
    assert batch_norms(folded) == []
    other = torch.randn(5, 4, dtype=torch.float64), torch.randint(0, 5, (2, 9))
    for inputs in ((x, edges), other):
        assert error(in_eval(folded, *inputs), in_eval(model, *inputs)) <= 1e-12


@pytest.mark.parametrize("how", ["index_add", "index_add_", "scatter_add_"])
def test_tune_mode_of_a_graph_convolution_has_the_gradients_of_the_frozen_one(how: str) -> None:
    model = randomise(GraphConv(how).double()).train()
    inputs = torch.randn(5, 4, dtype=torch.float64), torch.randint(0, 5, (2, 9))
    gradients = []
    for mode in ("eval", "tune"):
        frozen = ns.freeze(model, inputs, mode=mode)
        frozen(*inputs).square().sum().backward()
        gradients.append((frozen.bn.weight.grad, frozen.bn.bias.grad))
    assert frozen.bn.folded
    for actual, expected in zip(*gradients, strict=True):
        assert error(actual, expected) <= 1e-10


class Summing(nn.Module):
    """A convolution, a sum over its branches or positions, a BatchNorm."""

    def __init__(self, over: str) -> None:
        super().__init__()
        self.over = over
        self.conv = nn.Conv2d(3, 8 if over == "radix" else 4, 1, bias=True)
        self.bn = nn.BatchNorm1d(4) if over == "positions" else nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.over == "radix":
            return self.bn(y.view(len(y), 2, 4, *y.shape[2:]).sum(1))
        if self.over == "stack":
            return self.bn(torch.stack([y, self.conv(x.flip(2))]).sum(0))
        return self.bn(y.sum((2, 3)))


@pytest.mark.parametrize("over", ["radix", "stack", "positions"])
def test_a_sum_passes_a_shift_where_its_length_is_the_same_for_every_size(over: str) -> None:
    model = randomise(Summing(over).double()).eval()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    folded = ns.fold(model, x)
    assert type(folded.bn) is (ChannelShift if over == "positions" else nn.Identity)
    for each in (x, torch.randn(1, 3, 6, 5, dtype=torch.float64)):
        assert error(in_eval(folded, each), in_eval(model, each)) <= 1e-12
