"""A positive scale passes a function that is homogeneous, and the shift stays where it is."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import batch_norms, error, in_eval
from torch import Tensor, nn

import normswap as ns
from normswap.core.errors import NormswapError
from normswap.norms.pointwise.channel_affine import ChannelShift
from normswap.passes import Fold

X = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda x, _: F.relu(x),
    "relu_": lambda x, _: F.relu_(x),
    "leaky_relu": lambda x, _: F.leaky_relu(x, 0.2),
    "prelu": F.prelu,
    "abs": lambda x, _: x.abs(),
}


class Joined(nn.Module):
    """Two branches that end in a function join, and a BatchNorm takes the sum."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *, positive: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1, bias=False)
        self.bn, self.head = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, padding=1)
        self.slope, self.function = nn.Parameter(torch.rand(4)), function
        nn.init.uniform_(self.bn.weight, 0.5, 2)
        nn.init.normal_(self.bn.bias)
        self.bn.running_mean.normal_()
        self.bn.running_var.uniform_(0.5, 2)
        if not positive:
            self.bn.weight.data[1] *= -1
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        first = self.function(self.first(x), self.slope)
        return self.head(F.relu(self.bn(first + self.function(self.second(x), self.slope))))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_it_goes_into_both_branches(function: str) -> None:
    model = Joined(FUNCTIONS[function], positive=True)
    folded = ns.fold(model, X)
    assert type(folded.bn) is ChannelShift
    for x in (X, X[..., :4]):
        assert error(in_eval(folded, x), in_eval(model, x)) <= 1e-12


@pytest.mark.parametrize("function", FUNCTIONS)
def test_one_negative_scale_keeps_all_at_their_place(function: str) -> None:
    model = Joined(FUNCTIONS[function], positive=False)
    folded = ns.fold(model, X)
    assert batch_norms(folded) == ["bn"]
    assert error(in_eval(folded, X), in_eval(model, X)) <= 1e-12


def test_a_plan_of_positive_scales_refuses_others() -> None:
    decided = ns.plan(Joined(FUNCTIONS["relu"], positive=True), Fold(), inputs=X)
    with pytest.raises(NormswapError, match="plan it anew"):
        decided.apply(Joined(FUNCTIONS["relu"], positive=False))


@pytest.mark.parametrize("function", [F.gelu, F.relu6, torch.sigmoid, F.hardswish])
def test_a_function_that_is_not_homogeneous_stops_it(function: Callable[[Tensor], Tensor]) -> None:
    model = Joined(lambda x, _: function(x), positive=True)
    assert batch_norms(ns.fold(model, X)) == ["bn"]


def test_a_scale_alone_passes_zero_padding_and_a_mean_that_counts_it() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ZeroPad2d(1),
        nn.AvgPool2d(2, padding=1),
        nn.BatchNorm2d(4),
        nn.GELU(),
    )
    nn.init.normal_(model[3].weight)  # of any sign
    nn.init.normal_(model[3].running_mean)
    model.double().eval()
    folded = ns.fold(model, X)
    assert type(folded[3]) is ChannelShift
    assert error(in_eval(folded, X), in_eval(model, X)) <= 1e-12
