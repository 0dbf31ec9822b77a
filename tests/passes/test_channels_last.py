"""Channels-last changes where the numbers lie in memory, and nothing else."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import Residual, error, in_eval, randomise
from torch import Tensor, nn

import normswap as ns
from normswap.core.errors import NormswapError
from normswap.passes.edits.memory_format import to_channels_last
from normswap.passes.plan import Plan

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def laid_out(model: nn.Module, inputs: Any = None, *, inplace: bool = False) -> nn.Module:
    plan = Plan(edits=(to_channels_last(model, inputs),))
    return Plan.from_json(plan.to_json()).apply(model, inplace=inplace)


def lies_channels_last(tensor: Tensor) -> bool:
    """By the strides alone: N, then the positions, then the channels, which lie side by side."""
    order = sorted(range(tensor.dim()), key=lambda axis: -tensor.stride(axis))
    return tensor.stride(1) == 1 and (order[0] == 0 or tensor.stride(0) >= max(tensor.stride()))


class Everything(nn.Module):
    """Convolutions of every rank and kind, a tied weight, a tensor of rank 4 that is no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.full = nn.Conv2d(3, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.pointwise = nn.Conv2d(4, 4, 1)
        self.tied = nn.Conv2d(4, 4, 1)
        self.tied.weight = self.pointwise.weight
        self.transposed = nn.ConvTranspose2d(4, 6, 2, 2)
        self.volume = nn.Conv3d(1, 2, 3, padding=1)
        self.line = nn.Conv1d(2, 2, 1)
        self.fc = nn.Linear(4, 2)
        self.register_buffer("scale", torch.rand(1, 6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.tied(self.pointwise(self.depthwise(self.full(x)))).relu()
        x = self.transposed(x) * self.scale
        x = self.line(self.volume(x.unsqueeze(1)).flatten(2)).unflatten(2, (6, -1, 4))
        return self.fc(x).mean((2, 3))


def test_layout_is_no_part_of_the_function() -> None:
    model = Everything().double()
    after = laid_out(model, X.double())
    assert error(in_eval(after, X.double()), in_eval(model, X.double())) <= 1e-13
    assert all(
        torch.equal(t, after.state_dict()[name]) and t.dtype == after.state_dict()[name].dtype
        for name, t in model.state_dict().items()
    )


def test_all_tensors_of_rank_4_and_5_are_laid_out_and_no_others() -> None:
    model = Everything()
    strides = {name: tensor.stride() for name, tensor in model.state_dict().items()}
    after = laid_out(model, X)
    for name, tensor in after.state_dict().items():
        if tensor.dim() in (4, 5):
            assert lies_channels_last(tensor), name
        else:
            assert tensor.stride() == strides[name], name


def test_original_keeps_its_layout() -> None:
    model = Everything()
    strides = {name: tensor.stride() for name, tensor in model.state_dict().items()}
    laid_out(model, X)
    assert {name: tensor.stride() for name, tensor in model.state_dict().items()} == strides


def test_parameters_stay_the_same_objects() -> None:
    model = Everything()
    model.full.weight.requires_grad_(False)
    before = dict(model.named_parameters(remove_duplicate=False))
    after = dict(laid_out(model, X, inplace=True).named_parameters(remove_duplicate=False))
    assert before.keys() == after.keys()
    assert all(after[name] is tensor for name, tensor in before.items())
    assert model.tied.weight is model.pointwise.weight
    assert not model.full.weight.requires_grad and model.volume.weight.requires_grad


@pytest.mark.parametrize("name", ["full", "depthwise", "pointwise"])
def test_convolution_returns_channels_last_for_any_input(name: str) -> None:
    # Otherwise each input would have to be converted for the layout to be worth anything.
    model = laid_out(Everything(), X)
    conv = model.get_submodule(name)
    x = torch.randn(2, conv.in_channels, 8, 8)
    assert not lies_channels_last(x)
    assert lies_channels_last(conv(x))


def test_trains_in_the_layout() -> None:
    model = Everything().double()
    after = laid_out(model, X)
    for each in (model, after):
        each(X.double()).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), after.parameters(), strict=True):
        assert error(q.grad, p.grad) <= 1e-12, name


def test_deep_copy_keeps_the_layout() -> None:
    after = copy.deepcopy(laid_out(Everything(), X))
    assert all(lies_channels_last(t) for t in after.state_dict().values() if t.dim() in (4, 5))


@pytest.mark.parametrize("folded", [False, True])
def test_saved_and_loaded_model_has_the_layout(folded: bool, tmp_path: Path) -> None:
    model = randomise(Residual())
    after = laid_out(ns.fold(model, X) if folded else model, X)
    ns.save(after, tmp_path)
    loaded = ns.load(tmp_path, source=Residual)
    saved = after.state_dict()
    assert loaded.state_dict().keys() == saved.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, saved[name]), name
        assert tensor.dim() != 4 or lies_channels_last(tensor), name
    assert error(in_eval(loaded, X), in_eval(model, X)) <= 1e-5


class Views(nn.Module):
    """A view that joins channels and positions, which only channels-first memory allows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(144, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).view(x.shape[0], -1))


def test_model_that_does_not_run_in_the_layout_is_refused_and_stays() -> None:
    model = Views()
    strides, data = model.conv.weight.stride(), model.conv.weight.data_ptr()
    with pytest.raises(NormswapError, match=r"does not run in channels_last .*view.*leave"):
        to_channels_last(model, X)
    assert model.conv.weight.stride() == strides and model.conv.weight.data_ptr() == data


class MissingOperator(Views):
    """A model that does not run on this machine whatever the layout."""

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("no such operator")


def test_model_that_runs_in_no_layout_is_not_refused_for_it() -> None:
    assert lies_channels_last(laid_out(MissingOperator(), X).conv.weight)


def test_inputs_stay_as_they_are() -> None:
    model, x = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3)), X.clone()
    to_channels_last(model, x)
    assert torch.equal(x, X)


def test_a_fold_whose_result_does_not_run_in_the_layout_is_refused() -> None:
    class Folded(Views):
        def forward(self, x: Tensor) -> Tensor:
            x = self.bn(self.conv(x))
            return x.view(x.size(0), -1)

    model = Folded()
    model.bn = nn.BatchNorm2d(model.conv.out_channels)
    model.eval()
    ns.fold(model, X)(X)
    with pytest.raises(NormswapError, match=r"does not run in channels_last .*view.*leave"):
        ns.fold(model, X, channels_last=True)
