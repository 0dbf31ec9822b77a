"""Weight normalization against its paper and torch's own, and its data-dependent start."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import normswap as ns
from normswap.norms.registry import method_named
from normswap.norms.weight.weight_norm import data_dependent_init
from tests.networks import error


def weight_normed(layer: nn.Module, **options: Any) -> nn.Module:
    share = method_named("weight_norm").build(layer, "weight", **options)
    parametrize.register_parametrization(layer, "weight", share)
    return layer


@settings(deadline=None, max_examples=13)
@given(
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    dim=st.integers(0, 4),
    whole=st.booleans(),
    seed=st.integers(0, 99),
)
def test_forward_and_gradients_are_those_of_the_formula(
    shape: list[int], dim: int, whole: bool, seed: int
) -> None:
    """w = g v / ||v||, the norm over every axis but dim."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
    dim = dim % len(shape)
    weight_normed(layer, dim=None if whole else dim)
    g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    with torch.no_grad():
        g.add_(torch.randn(g.shape, generator=generator, dtype=torch.float64))
    probe = torch.randn(shape, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad((layer.weight * probe).sum(), (g, v))

    other_g, other_v = (t.detach().clone().requires_grad_() for t in (g, v))
    over = tuple(i for i in range(len(shape)) if whole or i != dim)
    expected = other_g * other_v / (other_v**2).sum(over, keepdim=True).sqrt()
    theirs = torch.autograd.grad((expected.view(shape) * probe).sum(), (other_g, other_v))
    assert error(layer.weight, expected.view(shape)) < 1e-14
    for one, other in zip(ours, theirs, strict=True):
        assert ((one - other).abs() < 1e-12 * (1 + other.abs().max())).all()


@pytest.mark.parametrize(
    ("make", "dim"),
    [
        (lambda: nn.Linear(4, 3), 0),
        (lambda: nn.Conv2d(4, 6, 3, groups=2), 0),
        (lambda: nn.ConvTranspose2d(4, 6, 3), 0),
        (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), 0),
        (lambda: nn.Conv1d(4, 6, 3), None),
    ],
)
def test_state_and_function_are_those_of_torch(make: Any, dim: int | None) -> None:
    theirs = parametrizations.weight_norm(make().double(), dim=dim)
    ours = weight_normed(make().double(), **({"dim": None} if dim is None else {}))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter))
    ours.load_state_dict(theirs.state_dict())
    assert error(ours.weight, theirs.weight) < 1e-14


@pytest.mark.parametrize("dim", [0, 1, None])
def test_state_of_the_older_weight_norm_loads_as_into_torchs(dim: int | None) -> None:
    def layers() -> nn.ModuleDict:
        return nn.ModuleDict(
            {"conv": nn.Conv1d(4, 6, 3), "up": nn.ConvTranspose1d(4, 6, 3), "fc": nn.Linear(3, 4)}
        )

    older, theirs = layers(), layers()
    for layer in older.values():
        torch.nn.utils.weight_norm(layer, dim=dim)
        nn.init.normal_(layer.weight_g)
    for layer in theirs.values():
        parametrizations.weight_norm(layer, dim=dim)
    ours = copy.deepcopy(ns.parametrize(layers(), "weight_norm", dim=dim))
    state = older.state_dict()
    assert set(state) == {f"{n}.{t}" for n in older for t in ("weight_g", "weight_v", "bias")}
    for model in (theirs, ours):
        model.load_state_dict(state, strict=True)
    for name in older:
        assert error(ours[name].weight, theirs[name].weight) < 1e-6
    tuned = ns.freeze(
        nn.Sequential(ours["conv"], nn.BatchNorm1d(6)), torch.ones(2, 4, 9), mode="tune"
    )
    tuned.load_state_dict(tuned.state_dict(), strict=True)


def test_units_of_a_grouped_transposed_convolution_have_lengths_of_their_own() -> None:
    layer = weight_normed(nn.ConvTranspose2d(4, 6, 3, groups=2).double(), dim="output")
    weight = layer.weight.detach()
    g = layer.parametrizations.weight.original0.flatten()
    for unit in range(6):
        group, index = divmod(unit, 3)
        assert torch.allclose(g[unit], weight[2 * group : 2 * group + 2, index].norm())


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Linear(6, 4)
        self.conv = nn.Conv2d(3, 5, 3)
        self.up = nn.ConvTranspose2d(5, 6, 2, groups=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.late(self.up(self.conv(x).relu()).relu().mean((2, 3)))


def test_data_dependent_init_normalizes_layer_by_layer() -> None:
    model = ns.plan(_Net().double(), ns.Parametrize("weight_norm")).apply(_Net().double())
    x = 3 * torch.randn(64, 3, 6, 6, dtype=torch.float64) + 1
    before = model.up.weight.detach().clone()
    data_dependent_init(model, x)
    conv, up = model.conv(x), model.up(model.conv(x).relu())
    for output, over in ((conv, (0, 2, 3)), (model(x), (0,))):
        assert output.mean(over).abs().max() < 1e-12
        assert (output.var(over, correction=0) - 1).abs().max() < 1e-12
    assert (up.var((0, 2, 3), correction=0) - 1).abs().max() < 1e-12
    assert up.mean((0, 2, 3)).abs().max() > 0.01  # without bias the mean stays
    ratio = model.up.weight / before
    assert (ratio - ratio.mean((0, 2, 3), keepdim=True)).abs().max() < 1e-12  # only lengths change


def test_data_dependent_init_follows_the_paper_from_its_start() -> None:
    """g = 1 / sigma[t], b = -mu[t] / sigma[t], with t = v x / ||v|| (eq. 5 and 6)."""
    layer = nn.Linear(4, 3).double()
    nn.init.zeros_(layer.bias)
    v = layer.weight.detach().clone()
    weight_normed(layer).parametrizations.weight.original0.data.fill_(1)
    x = torch.randn(50, 4, dtype=torch.float64)
    data_dependent_init(layer, (x,))
    t = x @ (v / v.norm(dim=1, keepdim=True)).T
    sigma = t.std(0, correction=0)
    assert error(layer.parametrizations.weight.original0.detach().flatten(), 1 / sigma) < 1e-12
    assert error(layer.bias.detach(), -t.mean(0) / sigma) < 1e-12


def test_data_dependent_init_counts_a_shared_layer_once() -> None:
    layer = weight_normed(nn.Linear(4, 4).double())
    model, x = nn.Sequential(layer, nn.Tanh(), layer), torch.randn(50, 4, dtype=torch.float64)
    data_dependent_init(model, x)
    assert (layer(x).var(0, correction=0) - 1).abs().max() < 1e-12
    handles = [*layer._forward_hooks.values()]
    assert not handles


def test_data_dependent_init_leaves_constant_outputs_finite() -> None:
    layer = weight_normed(nn.Linear(4, 4))
    before = copy.deepcopy(layer.state_dict())
    data_dependent_init(layer, torch.ones(8, 4))
    for name, tensor in layer.state_dict().items():
        assert tensor.isfinite().all()
        assert name == "bias" or torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    ("layer", "words"),
    [(nn.Linear(4, 3), "parametrize"), (weight_normed(nn.Linear(4, 3), dim=1), "no dim")],
)
def test_data_dependent_init_says_what_it_needs(layer: nn.Module, words: str) -> None:
    with pytest.raises(ns.NormswapError, match=words):
        data_dependent_init(layer, torch.randn(8, 4))
    assert not layer._forward_hooks


@pytest.mark.parametrize("dim", [2, -3, "outputs"])
def test_a_wrong_dim_is_refused(dim: Any) -> None:
    with pytest.raises(ns.NormswapError, match="dim="):
        method_named("weight_norm").build(nn.Linear(4, 3), "weight", dim=dim)


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "weight_standardization"])
def test_a_bias_has_no_units(name: str) -> None:
    with pytest.raises(ns.NormswapError, match="rank 1"):
        method_named(name).build(nn.Linear(4, 3), "bias")
