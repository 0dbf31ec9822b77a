"""`rescale(per="channel")` gives neighbouring layers equal ranges, and changes no bit."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from networks import in_eval
from torch import Tensor, nn

import normswap as ns
from normswap.core.errors import NormswapError

BETWEEN: dict[str, Any] = {
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(0.2),
    "nothing": nn.Identity,
    "pool": lambda: nn.MaxPool2d(3, 1, 1),
    "mean": lambda: nn.AvgPool2d(3, 1, 1),
}
CONVS: dict[str, Any] = {
    "plain": lambda: nn.Conv2d(8, 8, 3, padding=1),
    "depthwise": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
    "grouped": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(8, 8, 3, padding=1),
    "grouped and transposed": lambda: nn.ConvTranspose2d(8, 8, 3, padding=1, groups=4),
}


def spread(model: nn.Module) -> nn.Module:
    """Give the output channels of every layer ranges of their own."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.weight *= 10 ** torch.randn(
                    len(layer.weight), *[1] * (layer.weight.dim() - 1)
                )
    return model.eval()


def imbalance(first: Tensor, second: Tensor) -> float:
    """How far the ranges of the channels between two layers are apart: of Linears, (C,) each."""
    ratio = first.abs().amax(1) / second.abs().amax(0)
    return float(ratio.log2().abs().max())


@settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    kinds=st.lists(st.tuples(st.sampled_from(list(CONVS)), st.sampled_from(list(BETWEEN)))).filter(
        lambda kinds: 0 < len(kinds) < 5
    ),
    residual=st.booleans(),
)
def test_random_networks_are_the_same_to_the_bit(
    kinds: list[tuple[str, str]], residual: bool
) -> None:
    torch.manual_seed(0)

    class Adds(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: Tensor) -> Tensor:
            return x + self.body(x)

    layers: list[nn.Module] = []
    for conv, between in kinds:
        layer = nn.Sequential(CONVS[conv](), BETWEEN[between]())
        layers.append(Adds(layer) if residual else layer)
    net = [nn.Conv2d(3, 8, 3, padding=1), *layers, nn.Conv2d(8, 4, 1), nn.ReLU()]
    model = spread(nn.Sequential(*net, nn.Flatten(), nn.Linear(64, 2)))
    x = torch.randn(2, 3, 4, 4)
    result = ns.rescale(model, x, per="channel")
    assert torch.equal(in_eval(result, x), in_eval(model, x))
    plan = ns.plan_of(result)
    assert plan.edits and ns.Plan.from_json(plan.to_json()) == plan
    assert not ns.plan(result, ns.Equalize(), inputs=x).edits


def test_both_sides_have_the_same_range_within_the_root_of_two() -> None:
    model = spread(nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3)))
    result: Any = ns.rescale(model, torch.randn(2, 5), per="channel")
    assert imbalance(model[0].weight, model[2].weight) > 3
    assert imbalance(result[0].weight, result[2].weight) <= 1.01
    expected = model[0].bias * (result[0].weight / model[0].weight)[:, 0]
    assert torch.equal(result[0].bias, expected)


@pytest.mark.parametrize("between", ["gelu", "norm", "softmax", "two"])
def test_what_is_not_homogeneous_stops_it(between: str) -> None:
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if between == "norm":
                return F.layer_norm(x, x.shape[-1:])
            if between == "two":
                return torch.cat([x.relu(), x.tanh()], -1)
            return F.gelu(x) if between == "gelu" else x.softmax(-1)

    width = 16 if between == "two" else 8
    model = spread(nn.Sequential(nn.Linear(5, 8), Other(), nn.Linear(width, 3)))
    plan = ns.plan(model, ns.Equalize(), inputs=torch.randn(2, 5))
    assert not plan.edits and {each.site for each in plan.left} == {"0", "2"}


def test_int8_weights_per_tensor_lose_less() -> None:
    torch.manual_seed(0)
    model = spread(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()))
    model.append(nn.Linear(32, 4))
    x = torch.randn(64, 8)

    def rounded(net: nn.Module) -> Tensor:
        net = copy.deepcopy(net)
        with torch.no_grad():
            for layer in net.modules():
                if isinstance(layer, nn.Linear):
                    step = layer.weight.abs().max() / 127
                    layer.weight.copy_((layer.weight / step).round() * step)
        return in_eval(net, x)

    expected = in_eval(model, x)
    before = (rounded(model) - expected).square().mean()
    after = (rounded(ns.rescale(model, x, per="channel")) - expected).square().mean()
    assert after < before / 4


def test_globs_and_arguments_are_checked() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.randn(2, 3)
    with pytest.raises(NormswapError, match="matches no module"):
        ns.rescale(model, x, per="channel", include="layer9")
    with pytest.raises(NormswapError, match="'tensor' or per 'channel'"):
        ns.rescale(model, x, per="row")  # type: ignore[arg-type]
    with pytest.raises(NormswapError, match="measured on data"):
        ns.rescale(model, x)
