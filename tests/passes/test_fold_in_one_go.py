"""A fold also bakes normalized weights, whitens, and leaves a scale and shift where it must."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import ConvBN, Residual, batch_norms, error, in_eval, randomise
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import normswap as ns
from normswap.norms.pointwise.channel_affine import ChannelAffine
from normswap.passes import Fold
from normswap.passes.edits import Reduce

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", ["weight_norm", "spectral_norm", "weight_standardization"])
def test_normalized_weights_are_baked_and_folded(method: str) -> None:
    model = ns.parametrize(randomise(ConvBN(3, 8)), method)
    expected = in_eval(model, X)
    folded = ns.fold(model, X)
    assert not any(parametrize.is_parametrized(module) for module in folded.modules())
    assert isinstance(folded.bn, nn.Identity)
    assert error(in_eval(folded, X), expected) <= 1e-5
    assert parametrize.is_parametrized(model.conv)


def test_weights_normalized_by_torch_are_baked_without_a_batch_norm() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU())
    folded = ns.fold(model, X)
    assert not parametrize.is_parametrized(folded[0])
    assert error(in_eval(folded, X), in_eval(model, X)) <= 1e-6


def test_whitening_goes_into_the_convolution_before_it() -> None:
    model = ns.convert(randomise(ConvBN(3, 8)), "decorrelated_batch_norm", inputs=X).train()
    for _ in range(3):
        model(torch.randn(16, 3, 8, 8))  # a projection that is no diagonal
    model.eval()
    folded = ns.fold(model, X)
    assert isinstance(folded.bn, nn.Identity)
    assert error(in_eval(folded, X), in_eval(model, X)) <= 1e-5


def test_what_is_stopped_becomes_one_scale_and_shift_with_the_operator_named() -> None:
    model = randomise(Residual())
    with torch.no_grad():
        model.after.weight[0] *= -1  # which no ReLU commutes with
    plan = ns.plan(model, Fold(), inputs=X)
    (stays,) = (edit for edit in plan.edits if isinstance(edit, Reduce) and edit.to == "affine")
    assert stays.site == "after" and stays.reason.count("relu") == 2
    folded = plan.apply(model)
    assert isinstance(folded.after, ChannelAffine)
    assert sum(p.numel() for p in folded.after.parameters()) == 2 * 8
    assert not list(folded.after.buffers())
    assert error(in_eval(folded, X), in_eval(model, X)) <= 1e-5


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_channel_affine_is_the_formula_in_any_layout(memory_format: torch.memory_format) -> None:
    affine, x = ChannelAffine(3).double(), X.double().to(memory_format=memory_format)
    with torch.no_grad():
        affine.weight.normal_()
        affine.bias.normal_()
    expected = x * affine.weight.view(3, 1, 1) + affine.bias.view(3, 1, 1)
    assert error(affine(x), expected) <= 1e-14
    assert affine(x).is_contiguous(memory_format=memory_format)


def test_activation_of_a_batch_norm_that_stays_is_kept() -> None:
    timm = pytest.importorskip("timm")
    norm = timm.layers.BatchNormAct2d(4)
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), norm, nn.GELU()))
    folded = ns.fold(model, X)
    assert [type(module).__name__ for module in folded[2]] == ["ChannelAffine", "Identity", "ReLU"]
    assert error(in_eval(folded, X), in_eval(model, X)) <= 1e-5


def test_channels_last_lays_the_weights_out() -> None:
    model = randomise(ConvBN(3, 8))
    folded = ns.fold(model, X, channels_last=True)
    assert folded.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert error(in_eval(folded, X), in_eval(model, X)) <= 1e-5


def test_an_activation_in_place_does_not_reach_the_shortcut() -> None:
    """With the BatchNorm gone its output is its input, which the addition needs as well."""

    class PreActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3, padding=1)
            self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
            self.convs = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)])

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for norm, conv in zip(self.norms, self.convs, strict=True):
                x = x + conv(F.silu(norm(x), inplace=True))
            return x

    model = randomise(PreActivation()).double()
    x = X.double()
    folded = ns.fold(model, x)
    assert error(in_eval(folded, x), in_eval(model, x)) <= 1e-12
    assert len(batch_norms(folded)) == 2
    assert "goes to silu_" in str(ns.plan(model, Fold(), inputs=x))


@pytest.mark.parametrize("operator", [torch.neg_, lambda y: y.mul_(0.5)], ids=["neg_", "mul_"])
def test_an_operator_in_place_that_passes_an_affine_does_not_reach_the_shortcut(
    operator: Callable[[Tensor], Tensor],
) -> None:
    class PreActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return x + self.conv(operator(self.norm(x)))

    model = randomise(PreActivation()).double()
    x = X.double()
    folded = ns.fold(model, x)
    assert error(in_eval(folded, x), in_eval(model, x)) <= 1e-12
    assert "written into" in str(ns.plan(model, Fold(), inputs=x))


def test_an_exported_program_is_taken_as_it_is() -> None:
    model = randomise(ConvBN(3, 4)).eval()
    program = torch.export.export(model, (X,))
    folded = ns.fold(program, X)
    assert error(folded(X), model(X)) <= 1e-5
    assert not any(isinstance(m, (nn.BatchNorm2d, ChannelAffine)) for m in folded.modules())


def test_a_functional_norm_beside_a_weight_that_is_baked_is_folded() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = parametrizations.weight_norm(nn.Conv2d(3, 4, 1))
            self.register_buffer("mean", torch.randn(4))
            self.register_buffer("var", torch.rand(4) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(F.batch_norm(self.conv(x), self.mean, self.var))

    model, x = Both().double(), X.double()
    folded = ns.fold(model, x)
    assert error(in_eval(folded, x), in_eval(model, x)) <= 1e-12
    assert not parametrize.is_parametrized(folded.conv)
    assert ns.inspect(model, x).sites and not ns.inspect(folded, x).sites
