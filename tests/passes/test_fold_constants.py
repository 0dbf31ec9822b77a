"""Constants between a layer and a BatchNorm: added, subtracted, multiplied by, divided by."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import batch_norms, error, in_eval, randomise
from torch import Tensor, nn

import normswap as ns
from normswap.passes import Fold

Operator = Callable[[Any, Tensor], Tensor]


class Between(nn.Module):
    """A layer, an operator with a constant, a BatchNorm."""

    def __init__(self, layer: nn.Module, operator: Operator, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layer, self.bn = layer, nn.BatchNorm2d(4)
        self.operator = operator
        self.register_buffer("k", torch.rand(shape) + 0.5)
        self.register_buffer("j", torch.rand(shape) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.operator(self, self.layer(x)))


OPERATORS: dict[str, Operator] = {
    "z + 2": lambda m, z: z + 2.0,
    "2 + z": lambda m, z: 2.0 + z,
    "z - 2": lambda m, z: z - 2.0,
    "2 - z": lambda m, z: 2.0 - z,
    "z * 2": lambda m, z: z * 2.0,
    "z / 2 + 1": lambda m, z: z / 2.0 + 1.0,
    "(z + 1) * 3 - 2": lambda m, z: (z + 1.0) * 3.0 - 2.0,
    "z + k": lambda m, z: z + m.k,
    "z - k": lambda m, z: z - m.k,
    "k - z": lambda m, z: m.k - z,
    "z * k": lambda m, z: z * m.k,
    "k * z": lambda m, z: m.k * z,
    "z / k": lambda m, z: z / m.k,
    "(z + k) * j": lambda m, z: (z + m.k) * m.j,
    "(z * k + 1) / k": lambda m, z: (z * m.k + 1.0) / m.k,
    "z.mul(k).add(j, alpha=2)": lambda m, z: z.mul(m.k).add(m.j, alpha=2),
}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "with bias": lambda: nn.Conv2d(3, 4, 3, padding=1),
    "without bias": lambda: nn.Conv2d(3, 4, 1, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(3, 4, 2, stride=2),
}
SHAPES = {"one": (1, 1), "per channel": (1, 4, 1, 1)}
X = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def model_with(operator: Operator, layer: str = "with bias", shape: str = "one") -> nn.Module:
    torch.manual_seed(0)
    return randomise(Between(LAYERS[layer](), operator, SHAPES[shape]).double()).eval()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_batch_norm_folds_through_a_constant(operator: str, shape: str) -> None:
    layer = list(LAYERS)[(len(operator) + len(shape)) % 3]
    model = model_with(OPERATORS[operator], layer, shape)
    folded = ns.fold(model, X)
    assert batch_norms(folded) == []
    assert error(in_eval(folded, X), in_eval(model, X)) <= 1e-12


@pytest.mark.parametrize("operator", ["z + 2", "2 - z", "(z + 1) * 3 - 2", "z + k", "z * k"])
def test_a_constant_leaves_tune_mode_its_function_and_gradients(operator: str) -> None:
    model = model_with(OPERATORS[operator], shape="per channel").train()
    tuned, frozen = (ns.freeze(model, X, mode=mode) for mode in ("tune", "eval"))
    gradients = []
    for each in (frozen, tuned):
        y = each(X)
        y.square().sum().backward()
        gradients.append({name: p.grad for name, p in each.named_parameters()})
        assert error(y.detach(), in_eval(model, X)) <= 1e-12
    names = gradients[1].keys() & {"bn.weight", "bn.bias"}
    assert len(names) == 2
    for name in names:
        assert error(gradients[1][name], gradients[0][name]) <= 1e-10
    if operator[-1] != "k":
        assert tuned.bn.folded


def test_a_literal_that_is_added_is_folded_in_tune_mode_again_after_gamma_has_changed() -> None:
    model = model_with(OPERATORS["z + 2"])
    tuned = ns.freeze(model, X, mode="tune")
    for each in (model, tuned):
        with torch.no_grad():
            each.bn.weight.mul_(1.7)
            each.bn.bias.add_(0.3)
    assert error(in_eval(tuned, X), in_eval(model, X)) <= 1e-12


class Chain(nn.Module):
    """A gain that a first BatchNorm without shift goes into, and a second one has to pass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = (
            nn.Conv2d(3, 4, 1),
            nn.BatchNorm2d(4),
            nn.BatchNorm2d(4),
        )
        self.gain = nn.Parameter(torch.rand(4, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.conv(x) * self.gain))


def test_a_gain_that_has_taken_up_an_affine_is_not_read_as_it_was() -> None:
    model = randomise(Chain().double()).eval()
    with torch.no_grad():
        model.first.running_mean.zero_()
        model.first.bias.zero_()
    folded = ns.fold(model, X)
    assert error(in_eval(folded, X), in_eval(model, X)) <= 1e-12


class Counting(nn.Module):
    """A buffer that every call changes, between a convolution and a BatchNorm."""

    def __init__(self, operator: str) -> None:
        super().__init__()
        self.conv, self.bn, self.operator = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), operator
        self.register_buffer("k", torch.rand(1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        self.k.mul_(1.5)
        z = self.conv(x)
        return self.bn(z + self.k if self.operator == "+" else z * self.k)


@pytest.mark.parametrize("operator", ["+", "*"])
def test_a_constant_that_every_call_changes_is_none(operator: str) -> None:
    model = randomise(Counting(operator).double()).eval()
    folded = ns.fold(model, X)
    for _ in range(3):
        assert error(in_eval(folded, X), in_eval(model, X)) <= 1e-12


@pytest.mark.parametrize("value", [0.0, 1e-30, float("inf")])
def test_a_shift_stays_behind_a_factor_that_it_cannot_be_divided_by(value: float) -> None:
    model = model_with(OPERATORS["z * k"], shape="per channel")
    with torch.no_grad():
        model.k[0, 1] = value
    decided = ns.plan(model, Fold(), inputs=X)
    assert "one shift per channel" in map(str, decided.edits)
    expected = in_eval(model, X)
    folded = in_eval(decided.apply(model), X)
    same = torch.isclose(folded, expected, rtol=1e-11, atol=1e-11) | expected.isnan()
    assert same.all()


@pytest.mark.parametrize("groups", [1, 2])
def test_a_batch_norm_folds_into_a_pointwise_transposed_convolution(groups: int) -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 1, groups=groups))
    randomise(model.double())
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    folded = ns.fold(model, x)
    assert batch_norms(folded) == []
    assert error(in_eval(folded, x), in_eval(model, x)) <= 1e-12


@pytest.mark.parametrize("options", [{"stride": 2}, {"padding": 1}])
def test_a_transposed_convolution_that_adds_or_cuts_positions_stops_it(options: Any) -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 1, **options))
    randomise(model.double())
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    folded = ns.fold(model, x)
    assert len(batch_norms(folded)) == 1
    assert error(in_eval(folded, x), in_eval(model, x)) <= 1e-12
