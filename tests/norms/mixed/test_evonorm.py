"""What is particular to the two EvoNorms."""

import pytest
import torch
import torch.nn.functional as F
from networks import Residual, randomise
from torch import nn

import normswap as ns


def test_s0_of_an_input_of_unit_deviation_is_swish() -> None:
    x = torch.randn(64, 32, 16, dtype=torch.float64)
    x = x / x.std((1, 2), correction=0, keepdim=True)
    module = ns.create("evonorm_s0", 32, groups=1, eps=0.0).double()
    torch.testing.assert_close(module(x), F.silu(x), rtol=1e-9, atol=1e-9)


def test_s0_has_the_groups_of_group_norm() -> None:
    assert ns.create("evonorm_s0", 256).num_groups == 32
    assert ns.create("evonorm_s0", 24, groups=4).num_groups == 4
    assert ns.create("evonorm_s0", 24, channels_per_group=4).num_groups == 6
    with pytest.raises(ns.NormswapError, match="possible: 1, 2, 3, 6"):
        ns.create("evonorm_s0", 6, groups=4)


def test_s0_of_a_group_with_a_single_value_is_refused() -> None:
    with pytest.raises(ValueError, match="fewer groups"):
        ns.create("evonorm_s0", 4, groups=4)(torch.randn(3, 4))


def test_a_swap_of_s0_that_would_erase_its_input_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    with pytest.raises(ns.NormswapError, match="fewer groups"):
        ns.convert(model, "evonorm_s0", inputs=torch.randn(2, 3), groups=4)


@pytest.mark.parametrize(("method", "alone"), [("evonorm_s0", True), ("evonorm_b0", False)])
def test_only_s0_treats_each_sample_alone(method: str, alone: bool) -> None:
    module, x = ns.create(method, 4).train(), torch.randn(3, 4, 5)
    others = torch.cat([x[:1], x[1:] * 9])
    assert torch.allclose(module(x)[0], module(others)[0]) == alone


def test_b0_has_no_running_mean_and_takes_over_the_variance() -> None:
    model = randomise(Residual()).eval()
    converted = ns.convert(model, "evonorm_b0", inputs=torch.randn(2, 3, 8, 8))
    assert not hasattr(converted.bn, "running_mean")
    assert torch.equal(converted.bn.running_var, model.bn.running_var)


def test_b0_is_the_larger_of_both_deviations() -> None:
    module, x = ns.create("evonorm_b0", 2).double(), torch.randn(3, 2, 7, dtype=torch.float64)
    deviation = torch.sqrt(x.var((0, 2), correction=0, keepdim=True) + module.eps)
    with torch.no_grad():
        module.v.fill_(0.0)
    own = torch.sqrt(x.var(2, correction=0, keepdim=True) + module.eps)
    torch.testing.assert_close(module(x), x / torch.maximum(deviation, own))


@pytest.mark.parametrize("method", ["evonorm_s0", "evonorm_b0"])
def test_calibration_brings_a_network_nearer(method: str) -> None:
    model, x = randomise(Residual()).eval(), torch.randn(32, 3, 8, 8)
    options = {"exclude": "head"} if method == "evonorm_s0" else {}
    swapped = ns.convert(model, method, inputs=x, **options)
    fitted = ns.calibrate(ns.convert(model, method, inputs=x, **options), model, [x])

    def distance(other: nn.Module) -> float:
        with torch.no_grad():
            return (other.eval()(x) - model(x)).square().mean().item()

    assert distance(fitted) < 0.7 * distance(swapped)


@pytest.mark.parametrize("method", ["evonorm_s0", "evonorm_b0"])
def test_a_constant_input_has_finite_gradients(method: str) -> None:
    module = ns.create(method, 4)
    for x in (torch.zeros(3, 4, 5), torch.full((3, 4, 5), 7.0)):
        x.requires_grad_()
        y = module(x)
        y.square().sum().backward()
        assert torch.isfinite(y).all()
        assert torch.isfinite(x.grad).all()
