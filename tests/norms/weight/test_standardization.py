"""Weight standardization, plain and scaled, and centered weights against their formulas."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

import normswap as ns
from normswap.norms.registry import method_named
from tests.networks import error


def registered(layer: nn.Module, name: str, tensor: str = "weight", **options: Any) -> nn.Module:
    share = method_named(name).build(layer, tensor, **options)
    parametrize.register_parametrization(layer, tensor, share)
    return layer


@settings(deadline=None, max_examples=10)
@given(
    shape=st.lists(st.integers(2, 5), min_size=2, max_size=5),
    gain=st.booleans(),
    offset=st.booleans(),
    scaled=st.booleans(),
    spread=st.sampled_from([1e-4, 1.0]),
    seed=st.integers(0, 99),
)
def test_forward_and_gradients_are_those_of_the_formula(
    shape: list[int], gain: bool, offset: bool, scaled: bool, spread: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    layer = nn.Module()
    layer.weight = nn.Parameter(randn(*shape) * spread + 0.3)
    name = "scaled_weight_standardization" if scaled else "weight_standardization"
    eps = 1e-3
    options = {"gamma": 1.3} if scaled else {}
    registered(layer, name, eps=eps, gain=gain, offset=offset, **options)
    ours = list(layer.parametrizations.weight.parameters())
    with torch.no_grad():
        for parameter in ours:
            if parameter.numel() == shape[0]:
                parameter.add_(randn(*parameter.shape))
    theirs = [parameter.detach().clone().requires_grad_() for parameter in ours]
    weight = theirs[1 if gain else 0].flatten(1)
    count = weight.shape[1]
    centered = weight - weight.sum(1, keepdim=True) / count
    var = (centered**2).sum(1, keepdim=True) / count
    if scaled:
        expected = 1.3 * centered / (var * count).clamp(min=eps).sqrt()
    else:
        expected = centered / (var + eps).sqrt()
    if gain:
        expected = expected * theirs[0].flatten(1)
    if offset:
        expected = expected + theirs[-1].flatten(1)
    expected = expected.view(shape)
    probe = randn(*shape)
    assert ((layer.weight - expected).abs() < 1e-12 * (1 + expected.abs().max())).all()
    grads = (
        torch.autograd.grad((layer.weight * probe).sum(), ours),
        torch.autograd.grad((expected * probe).sum(), theirs),
    )
    for one, other in zip(*grads, strict=True):
        assert ((one - other).abs() < 1e-9 * (1 + other.abs().max())).all()


@pytest.mark.parametrize("groups", [1, 2])
def test_units_of_a_transposed_convolution_are_its_outputs(groups: int) -> None:
    layer = nn.ConvTranspose2d(4, 6, 3, groups=groups).double()
    nn.init.normal_(layer.weight, 2, 3)
    registered(layer, "weight_standardization", gain=False, offset=False, eps=0.0)
    per_group, inputs = 6 // groups, 4 // groups
    for unit in range(6):
        group, index = divmod(unit, per_group)
        part = layer.weight[group * inputs : (group + 1) * inputs, index]
        assert part.mean().abs() < 1e-12
        assert (part.var(correction=0) - 1).abs() < 1e-12


def test_scaled_standardization_keeps_the_variance_of_a_signal() -> None:
    """With gain 1 and gamma for ReLU, var(W relu(x)) is 1 for x ~ N(0, 1) (Brock et al. 2021)."""
    gamma = math.sqrt(2 / (1 - 1 / math.pi))
    layer = nn.Linear(512, 256, bias=False).double()
    registered(layer, "scaled_weight_standardization", gamma=gamma, gain=False, offset=False)
    y = layer(F.relu(torch.randn(2000, 512, dtype=torch.float64)))
    assert abs(y.var().item() - 1) < 0.05


@pytest.mark.parametrize("name", ["weight_standardization", "scaled_weight_standardization"])
def test_units_of_a_single_weight_are_refused(name: str) -> None:
    with pytest.raises(ns.NormswapError, match="erased"):
        method_named(name).build(nn.Conv2d(4, 4, 1, groups=4), "weight")


def test_a_gamma_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ns.NormswapError, match="gamma"):
        method_named("scaled_weight_standardization").build(nn.Linear(3, 3), "weight", gamma=0.0)


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: nn.Linear(4, 6), torch.randn(5, 4)),
        (lambda: nn.Conv2d(4, 6, 3), torch.randn(2, 4, 5, 5)),
        (lambda: nn.ConvTranspose1d(4, 6, 3), torch.randn(2, 4, 5)),
    ],
)
def test_rms_norm_after_centered_outputs_is_the_layer_norm(make: Any, x: torch.Tensor) -> None:
    """Jiang et al. 2023: LN(W x + b) = RMS(W' x + b'), for W and b centered over the outputs."""
    layer = make().double()
    axis = -1 if x.dim() == 2 else 1
    plain = layer(x.double()).movedim(axis, -1)
    registered(registered(layer, "centered_weight"), "centered_weight", "bias")
    centered = layer(x.double()).movedim(axis, -1)
    assert centered.mean(-1).abs().max() < 1e-14
    assert error(F.rms_norm(centered, (6,), eps=1e-5), F.layer_norm(plain, (6,))) < 1e-12


@pytest.mark.parametrize("groups", [1, 2])
def test_centered_units_have_mean_zero(groups: int) -> None:
    layer = nn.Conv2d(4, 6, 3, groups=groups).double()
    before = layer.weight.detach().clone()
    registered(layer, "centered_weight", dim=1)
    assert error(layer.weight, before - before.mean((1, 2, 3), keepdim=True)) < 1e-14


def test_a_centered_weight_is_kept() -> None:
    layer = nn.Linear(4, 6).double()
    with torch.no_grad():
        layer.weight.sub_(layer.weight.mean(0))
    before = layer.weight.detach().clone()
    registered(layer, "centered_weight")
    assert error(layer.weight, before) < 1e-14


@pytest.mark.parametrize(
    ("layer", "tensor", "dim", "words"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "weight", 0, "grouped"),
        (nn.Linear(4, 4), "bias", 1, "rank 1"),
        (nn.Linear(4, 4), "weight", 2, "dim is 0"),
    ],
)
def test_what_cannot_be_centered_is_refused(
    layer: nn.Module, tensor: str, dim: int, words: str
) -> None:
    with pytest.raises(ns.NormswapError, match=words):
        method_named("centered_weight").build(layer, tensor, dim=dim)
