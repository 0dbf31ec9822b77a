"""Spectral normalization against singular values computed otherwise, and torch's own."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import normswap as ns
from normswap.norms.registry import method_named
from normswap.norms.weight.spectral_norm import AsConvolution
from tests.networks import error


def spectral_normed(layer: nn.Module, **options: Any) -> nn.Module:
    share = method_named("spectral_norm").build(layer, "weight", **options)
    training = layer.training
    parametrize.register_parametrization(layer.eval(), "weight", share)
    return layer.train(training)


def dense(layer: nn.Module, size: tuple[int, ...]) -> Tensor:
    """The matrix of a convolution, column by column, by the layer itself."""
    shape = torch.Size([layer.in_channels, *size])
    basis = torch.eye(shape.numel(), dtype=torch.float64).view(-1, *shape)
    bias, layer.bias = layer.bias, None
    with torch.no_grad():
        columns = layer(basis).flatten(1)
    layer.bias = bias
    return columns.T


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(5, 7),
        lambda: nn.Conv2d(3, 4, 3),
        lambda: nn.Conv2d(4, 6, 3, groups=2),
        lambda: nn.ConvTranspose2d(3, 4, 3),
    ],
)
def test_without_gain_it_is_torchs(make: Any) -> None:
    """From the same state: the same weight, gradient and estimates, step by step."""
    ours = spectral_normed(make().double(), gain=False, n_power_iterations=2)
    theirs = parametrizations.spectral_norm(make().double(), n_power_iterations=2)
    theirs.load_state_dict(ours.state_dict())
    start = torch.randn_like(ours.parametrizations.weight[0]._v)
    for layer in (ours, theirs):
        layer.parametrizations.weight[0]._v.copy_(start / start.norm())
    probe = torch.randn_like(ours.parametrizations.weight.original)
    for _ in range(3):
        grads = [
            torch.autograd.grad(
                (layer.weight * probe).sum(), layer.parametrizations.weight.original
            )
            for layer in (ours, theirs)
        ]
        assert error(grads[0][0], grads[1][0]) < 1e-12
    ours.eval(), theirs.eval()
    assert error(ours.weight, theirs.weight) < 1e-13
    assert error(ours.parametrizations.weight[0]._u, theirs.parametrizations.weight[0]._u) < 1e-13


@settings(deadline=None, max_examples=13)
@given(
    outputs=st.integers(1, 6),
    inputs=st.integers(1, 6),
    kernel=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("solver", ["power", "svd"])
def test_sigma_is_the_largest_singular_value(
    solver: str, outputs: int, inputs: int, kernel: int, seed: int
) -> None:
    layer = nn.Conv1d(inputs, outputs, kernel).double()
    with torch.no_grad():
        layer.weight.normal_(generator=torch.Generator().manual_seed(seed))
    sigma = torch.linalg.svdvals(layer.weight.detach().flatten(1)).max()
    spectral_normed(layer, solver=solver)
    gain = layer.parametrizations.weight.original0
    assert gain <= sigma * (1 + 1e-12)
    assert gain >= sigma * (1 - (1e-12 if solver == "svd" else 0.02))


CONVOLUTIONS = {
    "plain": (lambda: nn.Conv2d(2, 3, 3), (5, 4)),
    "strided": (lambda: nn.Conv2d(4, 6, 3, 2, 1, groups=2), (6, 5)),
    "dilated": (lambda: nn.Conv1d(2, 3, 3, dilation=2, padding=2), (7,)),
    "same": (lambda: nn.Conv2d(2, 3, (2, 3), padding="same"), (4, 5)),
    "circular": (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (4, 5)),
    "reflect": (lambda: nn.Conv1d(2, 3, 5, stride=2, padding=2, padding_mode="reflect"), (7,)),
    "3d": (lambda: nn.Conv3d(2, 2, 2, padding=1), (3, 2, 3)),
    "transposed": (
        lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2),
        (3, 4),
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_operator_is_the_convolution_and_its_transpose(name: str) -> None:
    make, size = CONVOLUTIONS[name]
    layer = make().double()
    matrix, operator = dense(layer, size), AsConvolution(layer, size)
    weight = layer.weight.detach()
    shape_u, shape_v = operator.shapes(weight)
    u = torch.randn(shape_u, dtype=torch.float64)
    v = torch.randn(shape_v, dtype=torch.float64)
    assert error(operator.map(weight, v).flatten(), matrix @ v.flatten()) < 1e-13
    assert error(operator.map_back(weight, u).flatten(), matrix.T @ u.flatten()) < 1e-13


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_operator_norm_is_that_of_the_whole_map(name: str) -> None:
    make, size = CONVOLUTIONS[name]
    layer = make().double()
    norm = torch.linalg.svdvals(dense(layer, size)).max()
    spectral_normed(layer, conv="operator", input_size=list(size), gain=False).train()
    for _ in range(300):
        assert layer.weight.requires_grad
    layer.eval()
    plain = make().double()
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
    assert (torch.linalg.svdvals(dense(plain, size)).max() - 1).abs() < 1e-3
    assert norm > 0


def test_gradient_of_sigma_is_u_v() -> None:
    """At convergence the gradient of sigma is u v^T (Miyato et al., eq. 11)."""
    layer = spectral_normed(nn.Linear(4, 3).double(), solver="svd", gain=False)
    original = layer.parametrizations.weight.original
    probe = torch.randn(3, 4, dtype=torch.float64)
    (ours,) = torch.autograd.grad((layer.weight * probe).sum(), original)
    w = original.detach()
    u, s, vh = torch.linalg.svd(w)
    outer = torch.outer(u[:, 0], vh[0])
    assert error(ours, probe / s[0] - (probe * w).sum() / s[0] ** 2 * outer) < 1e-12


def test_estimates_move_in_training_only() -> None:
    layer = spectral_normed(nn.Conv2d(3, 4, 3))
    u = layer.parametrizations.weight[0]._u
    with torch.no_grad():
        layer.parametrizations.weight.original1.normal_()
    before = u.clone()
    layer.eval()(torch.randn(1, 3, 5, 5))
    assert torch.equal(u, before)
    layer.train()(torch.randn(1, 3, 5, 5))
    assert not torch.equal(u, before)


def test_start_is_the_same_every_time() -> None:
    layer = nn.Conv2d(3, 4, 3)
    state = torch.get_rng_state()
    one, other = spectral_normed(copy.deepcopy(layer)), spectral_normed(copy.deepcopy(layer))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.parametrizations.weight[0]._u, other.parametrizations.weight[0]._u)


@pytest.mark.parametrize("conv", ["matrix", "operator"])
def test_two_forwards_before_a_backward_and_checkpointing(conv: str) -> None:
    layer = spectral_normed(nn.Conv2d(3, 4, 3, padding=1), conv=conv, input_size=5).train()
    x = torch.randn(2, 3, 5, 5)
    (layer(x).sum() - layer(2 * x).sum()).backward()
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize("conv", ["matrix", "operator"])
def test_sigma_does_not_depend_on_autocast(conv: str) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 8, 3, padding=1)
    options = {"conv": "operator", "input_size": 5} if conv == "operator" else {}
    with torch.autocast("cpu", torch.bfloat16):
        layer = spectral_normed(copy.deepcopy(plain), **options).train()
        under = layer.weight
    assert under.dtype == torch.float32
    for weight in (under, layer.weight):
        torch.testing.assert_close(weight, plain.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"solver": "lanczos"}, "solver"),
        ({"conv": "fft"}, "conv"),
        ({"n_power_iterations": 0}, "at least 1"),
        ({"conv": "operator"}, "input_size"),
        ({"conv": "operator", "input_size": [4]}, "2 numbers"),
        ({"conv": "operator", "input_size": 5, "solver": "svd"}, "svd"),
    ],
)
def test_impossible_options_are_refused_in_one_line(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ns.NormswapError, match=words) as raised:
        method_named("spectral_norm").build(nn.Conv2d(3, 4, 3), "weight", **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("size", [0, -3, 1])
def test_a_size_that_a_convolution_does_not_take_is_refused(size: int) -> None:
    build = method_named("spectral_norm").build
    with pytest.raises(ns.NormswapError, match=f"takes no input of size {size}") as raised:
        build(nn.Conv2d(3, 4, 3), "weight", conv="operator", input_size=size)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("training", [False, True])
def test_autocast_takes_no_digits_from_sigma(training: bool) -> None:
    model = ns.parametrize(nn.Sequential(nn.Linear(6, 8)), "spectral_norm").train(training)
    twin = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        weight = model[0].weight
    torch.testing.assert_close(weight, twin[0].weight)
    chain, expected = (each[0].parametrizations.weight[0] for each in (model, twin))
    torch.testing.assert_close(chain._u, expected._u)
