"""What the methods of the sample family do in the place of another normalization."""

import pytest
import torch
from networks import Residual, error, in_eval, randomise
from torch import nn

import normswap as ns


def network() -> tuple[nn.Module, torch.Tensor]:
    return randomise(Residual()).eval(), torch.randn(2, 3, 9, 9)


@pytest.mark.parametrize(
    "name", ["filter_response_norm", "global_response_norm", "positional_norm", "rms_norm"]
)
def test_calibrated_swaps_keep_the_moments_of_every_channel(name: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))).eval()
    data = [3 * torch.randn(16, 3, 9, 9) + 1 for _ in range(2)]
    after = in_eval(ns.convert(model, name, data=data), torch.cat(data)).transpose(0, 1).flatten(1)
    before = in_eval(model, torch.cat(data)).transpose(0, 1).flatten(1)
    assert error(after.mean(1), before.mean(1)) <= 1e-4
    assert error(after.std(1), before.std(1)) <= 1e-4


def test_a_swap_to_filter_response_norm_has_no_threshold_unless_asked_for() -> None:
    model, x = network()
    skip = {"inputs": x, "exclude": "head"}
    assert ns.convert(model, "filter_response_norm", **skip).after.tau is None
    assert ns.convert(model, "filter_response_norm", tlu=True, **skip).after.tau is not None


def test_filter_response_norm_of_one_value_is_refused_without_an_eps_to_learn() -> None:
    model, x = network()
    with pytest.raises(ns.NormswapError, match="head would normalize over a single value"):
        ns.convert(model, "filter_response_norm", inputs=x)
    learned = ns.convert(model, "filter_response_norm", inputs=x, learnable_eps=True)
    assert learned.head.eps_l.item() == pytest.approx(1e-4)
    assert in_eval(learned, x).isfinite().all()


def test_global_response_norm_is_the_batch_norm_where_norms_are_as_its_statistics_say() -> None:
    bn = randomise(nn.BatchNorm2d(6)).double().eval()
    new = ns.convert(nn.Sequential(bn), "global_response_norm", eps=0.0)
    # Each channel of each sample is given exactly the mean and variance of its running statistics.
    x = torch.randn(4, 6, 5, 5, dtype=torch.float64)
    x = x - x.mean((2, 3), keepdim=True)
    x = x / x.square().mean((2, 3), keepdim=True).sqrt()
    mean, var = (each.double().view(1, 6, 1, 1) for each in (bn.running_mean, bn.running_var))
    x = x * var.sqrt() + mean
    assert error(in_eval(new, x), bn(x)) <= 1e-12


@pytest.mark.parametrize("residual", [True, False])
def test_global_response_norm_of_a_dead_channel_has_finite_gradients(residual: bool) -> None:
    x = torch.randn(2, 4, 3, 3)
    x[0, 1] = x[1] = 0
    x.requires_grad_()
    module = ns.create("global_response_norm", 4, residual=residual)
    nn.init.ones_(module.weight)
    (module(x) * torch.randn(2, 4, 3, 3)).sum().backward()
    assert x.grad.isfinite().all() and module.weight.grad.isfinite().all()


def test_global_response_norm_starts_as_the_identity() -> None:
    x = torch.randn(2, 4, 3, 3)
    assert error(ns.create("global_response_norm", 4)(x), x) <= 1e-7


def test_local_response_norm_is_torchs_and_drops_gain_and_bias() -> None:
    model, x = network()
    options = {"size": 3, "alpha": 0.5, "beta": 0.6, "k": 2.0}
    swapped = ns.convert(model, "local_response_norm", inputs=x, **options)
    for norm in (swapped.first.bn, swapped.after):
        y = torch.randn(2, 8, 5, 4)
        assert error(norm(y), nn.LocalResponseNorm(**options)(y)) <= 1e-6
        assert not list(norm.parameters())
    (site, *_) = ns.inspect(swapped, x).sites
    assert site.kind == "local_response"


@pytest.mark.parametrize("size", [0, -1])
def test_a_window_of_no_channels_is_refused(size: int) -> None:
    with pytest.raises(ns.NormswapError, match="at least 1"):
        ns.create("local_response_norm", 6, size=size)


def test_a_site_with_channels_last_is_normalized_there() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6)).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    options = {"include": "1", "inputs": x}
    expected = in_eval(model, x)
    assert error(in_eval(ns.convert(model, "positional_norm", **options), x), expected) <= 1e-12
    new = in_eval(ns.convert(model, "filter_response_norm", **options), x)
    h = model[0](x)
    assert error(new, (h / (h.square().mean(1, keepdim=True) + 1e-5).sqrt()).detach()) <= 1e-12
