"""A decorrelated batch norm goes into the layer before it; weight norms by hooks are baked."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import error, in_eval
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

import normswap as ns
from normswap.core.errors import NormswapError
from normswap.graph.capture import capture
from normswap.graph.sites import find_sites
from normswap.norms.batch.whitening import DecorrelatedBatchNorm
from normswap.passes.edits.parametrizations import bake_hooks
from normswap.passes.whiten import fold_whitening

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def drawn(model: nn.Module) -> nn.Module:
    """Give every whitening statistics and an affine that do something."""
    for norm in model.modules():
        if isinstance(norm, DecorrelatedBatchNorm):
            with torch.no_grad():
                for tensor in (*norm.parameters(), norm.running_mean, norm.running_projection):
                    if tensor is not None:
                        tensor.normal_()
    return model


def whitened(model: nn.Module, x: Tensor) -> tuple[nn.Module, dict[str, str]]:
    """The folded model, which computes the same in float64, and why each site is left."""
    drawn(model)
    seen = capture(model, x)
    edits, left = fold_whitening(seen, find_sites(seen))
    plan = ns.Plan(edits=tuple(edits))
    assert ns.Plan.from_json(plan.to_json()) == plan
    exact = copy.deepcopy(model).double()
    assert error(in_eval(plan.apply(exact), x.double()), in_eval(exact, x.double())) <= 1e-10
    result = plan.apply(model)
    assert error(in_eval(result, x), in_eval(model, x)) <= 1e-4
    return result, {site.name: reason for site, reason in left}


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, DecorrelatedBatchNorm)]


@st.composite
def layer_then_whitening(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    size = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 2))
    channels = size * groups * draw(st.integers(1, 2))
    norm = DecorrelatedBatchNorm(channels, group_size=size, affine=draw(st.booleans()))
    bias, dims = draw(st.booleans()), draw(st.sampled_from([0, 1, 2, 3]))
    if not dims:
        return nn.Sequential(nn.Linear(4, channels, bias=bias), norm), torch.randn(3, 4)
    layer: nn.Module
    if draw(st.booleans()):
        layer = TRANSPOSED[dims](4, channels, 2, stride=2, bias=bias)
    else:
        layer = CONV[dims](4, channels, 2, padding=1, groups=groups, bias=bias)
    between = draw(st.sampled_from([nn.Identity(), nn.Dropout(), nn.Flatten(2)]))
    return nn.Sequential(layer, between, norm), torch.randn(2, 4, *[3] * dims)


@settings(max_examples=13, deadline=None, derandomize=True)
@given(layer_then_whitening())
def test_any_layer_takes_in_the_whitening_after_it(model_and_input: Any) -> None:
    result, left = whitened(*model_and_input)
    assert not left
    assert not norms(result)


MOVED = {
    "transpose": lambda y: y.transpose(2, 3),
    "swapaxes": lambda y: y.swapaxes(2, 3),
    "swapdims": lambda y: y.swapdims(-1, 2),
    "moveaxis": lambda y: y.moveaxis(2, 3),
    "movedim": lambda y: y.movedim((2, 3), (3, 2)),
    "mT": lambda y: y.mT,
    "there and back": lambda y: y.swapaxes(1, 2).swapdims(1, 2),
    "view_as": lambda y: y.view_as(torch.empty(*y.shape)),
    "reshape_as": lambda y: y.reshape_as(torch.empty(*y.shape[:2], 20)),
    "alpha dropout": lambda y: torch.alpha_dropout(y, 0.5, False),
    "to": lambda y: y.to(y.dtype).contiguous(),
}


@pytest.mark.parametrize("name", list(MOVED))
def test_what_moves_channels_as_a_whole_lies_between(name: str) -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), DecorrelatedBatchNorm(4, group_size=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(MOVED[name](self.conv(x)))

    result, left = whitened(Between(), torch.randn(2, 3, 4, 5))
    assert not left
    assert not norms(result)


def test_a_parametrized_weight_is_baked_on_the_way() -> None:
    layer = parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    result, _ = whitened(nn.Sequential(layer, DecorrelatedBatchNorm(4)), torch.randn(2, 3, 6, 6))
    assert not norms(result)
    assert not hasattr(result[0], "parametrizations")


class Shared(nn.Module):
    """One convolution, called with and without the whitening."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), DecorrelatedBatchNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.conv(2 * x)


class Used(nn.Module):
    """What is whitened is used raw, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), DecorrelatedBatchNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x + self.norm(x)


class Before(Used):
    """What is computed before the whitened value is used raw, too."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x.flatten(2) + self.norm(x.flatten(2))


class Scattered(nn.Module):
    """The channels of the convolution are not those of the whitening."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 1, 1), DecorrelatedBatchNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).flatten(1))


class Turned(Scattered):
    """The channels come in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.norm(x.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Shared(), "also computes"),
        (Used(), "also used by"),
        (Before(), "also used by"),
        (Scattered(), "another axis"),
        (Turned(), "their order"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), DecorrelatedBatchNorm(4)), "relu"),
        (nn.Sequential(nn.Conv2d(3, 6, 1, groups=3), DecorrelatedBatchNorm(6)), "groups"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 1), DecorrelatedBatchNorm(4, track_running_stats=False)),
            "running statistics",
        ),
        (nn.Sequential(DecorrelatedBatchNorm(3)), "input"),
    ],
)
def test_what_cannot_be_folded_is_left_with_its_reason(model: nn.Module, reason: str) -> None:
    result, left = whitened(model, torch.randn(2, 3, 2, 2))
    assert [reason in why for why in left.values()] == [True]
    assert len(norms(result)) == 1


def test_dtype_flags_and_hooks_survive() -> None:
    model = drawn(nn.Sequential(nn.Conv2d(3, 4, 1), DecorrelatedBatchNorm(4)))
    model.to(memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    calls: list[int] = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 3, 2, 2)
    seen = capture(model, x)
    edits, _ = fold_whitening(seen, find_sites(seen))
    calls.clear()
    result = ns.Plan(edits=tuple(edits)).apply(model)
    in_eval(result, x)
    assert calls == [1]
    assert isinstance(result[1], nn.Identity)
    assert not result[0].weight.requires_grad
    assert result[0].bias.requires_grad
    assert result[0].weight.is_contiguous(memory_format=torch.channels_last)


# --- weight and spectral norm by hooks ------------------------------------------------------------


def hooked() -> nn.Module:
    return nn.Sequential(
        weight_norm(nn.Conv2d(3, 4, 3)), spectral_norm(nn.ConvTranspose2d(4, 4, 3))
    )


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_that_hooks_compute_become_plain() -> None:
    model, x = hooked(), torch.randn(2, 3, 6, 6)
    for _ in range(3):
        model(x)  # the power iteration of the spectral norm moves on
    model.requires_grad_(False)
    model[0].weight_g.requires_grad_(True)
    plan = ns.Plan(edits=tuple(bake_hooks(model)))
    assert ns.Plan.from_json(plan.to_json()) == plan
    expected = in_eval(model, x)
    plan.apply(model, inplace=True)
    assert torch.equal(in_eval(model, x), expected)
    assert set(model.state_dict()) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert model[0].weight.requires_grad
    assert not model[1].weight.requires_grad
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not list(bake_hooks(model))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_baking_hooks_that_fails_puts_them_back() -> None:
    model, x = hooked(), torch.randn(2, 3, 6, 6)
    edits, keys, expected = list(bake_hooks(model)), list(model.state_dict()), in_eval(model, x)
    with pytest.raises(NormswapError, match="another model"):
        ns.Plan(edits=(*edits, edits[0])).apply(model, inplace=True)
    assert list(model.state_dict()) == keys
    assert torch.equal(in_eval(model, x), expected)
