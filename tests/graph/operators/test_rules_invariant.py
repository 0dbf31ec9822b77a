"""Normalizations by the statistics of the sample fold in affines, and drop unseen shifts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import error, in_eval, randomise
from torch import Tensor, nn

import normswap as ns
from normswap.passes import Fold, Freeze

CHANNELS = 4


class Padded(nn.Module):
    """conv, zero padding, bn, another normalization: no shift gets through the padding."""

    def __init__(self, after: Callable[[], nn.Module], *, last: bool = False) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, CHANNELS, 1), nn.BatchNorm2d(CHANNELS)
        self.after, self.last = after(), last

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(F.pad(self.conv(x), (1, 1, 1, 1)))
        return self.after(y.permute(0, 2, 3, 1) if self.last else y)


def gone(model: nn.Module) -> bool:
    """Whether a fold removes `bn`; it computes the same."""
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    plan = ns.plan(model, Fold(), inputs=x)
    assert error(in_eval(plan.apply(model), x), in_eval(model, x)) <= 1e-10
    return any(edit.effect == "removes" and edit.site == "bn" for edit in plan.edits)


def drawn(model: nn.Module, *, same_shift: bool = False) -> nn.Module:
    """The model with random statistics; `same_shift`: all channels have one."""
    randomise(model.double())
    if same_shift:
        bn: Any = model.get_submodule("bn")
        with torch.no_grad():
            scale = bn.weight / (bn.running_var + bn.eps).sqrt()
            # Powers of two, so that the shift is the same to the last bit.
            scale = torch.exp2(scale.log2().round())
            bn.eps = 0.0
            bn.running_var.fill_(1.0)
            bn.weight.copy_(scale)
            bn.running_mean.zero_()
            bn.bias.fill_(0.25)
    return model


@pytest.mark.parametrize(
    ("after", "any_shift", "same_shift"),
    [
        (lambda: nn.InstanceNorm2d(CHANNELS), True, True),
        (lambda: nn.GroupNorm(CHANNELS, CHANNELS), True, True),
        (lambda: nn.GroupNorm(2, CHANNELS), False, True),
        (lambda: nn.LayerNorm((CHANNELS, 6, 6)), False, True),
        (lambda: nn.LayerNorm(6), True, True),
        # An affine from running statistics, which folds in another.
        (lambda: nn.InstanceNorm2d(CHANNELS, track_running_stats=True), True, True),
        (lambda: nn.RMSNorm(6), False, False),
        (lambda: nn.Tanh(), False, False),
    ],
)
def test_a_shift_that_the_next_normalization_does_not_see_is_dropped(
    after: Callable[[], nn.Module], any_shift: bool, same_shift: bool
) -> None:
    assert gone(drawn(Padded(after))) == any_shift
    assert gone(drawn(Padded(after), same_shift=True)) == same_shift


def test_a_shift_that_something_else_sees_too_is_not_dropped() -> None:
    class Seen(Padded):
        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(F.pad(self.conv(x), (1, 1)))
            return self.after(y) + y.tanh()

    assert not gone(drawn(Seen(lambda: nn.InstanceNorm2d(CHANNELS))))


def test_a_dropped_shift_has_no_gradient_in_tune_mode_either() -> None:
    model = drawn(Padded(lambda: nn.InstanceNorm2d(CHANNELS)))
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    weights = torch.randn(2, CHANNELS, 6, 6, dtype=torch.float64)
    tuned = ns.plan(model, Freeze(mode="tune"), inputs=x).apply(model)
    assert tuned.bn.folded
    gradients = []
    for each in (ns.freeze(model), tuned):
        each.train()
        (each(x) * weights).sum().backward()
        gradients.append({name: p.grad for name, p in each.named_parameters()})
    eager = gradients[0]
    tuning = {name.replace("parametrizations.", ""): g for name, g in gradients[1].items()}
    for name in ("bn.weight", "bn.bias"):
        zero = torch.zeros(CHANNELS, dtype=torch.float64)
        actual = zero if tuning[name] is None else tuning[name]
        torch.testing.assert_close(actual, eager[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.GroupNorm(2, CHANNELS),
        lambda: nn.InstanceNorm2d(CHANNELS, affine=True),
        lambda: nn.Sequential(_Last(nn.LayerNorm(CHANNELS))),
        lambda: nn.Sequential(_Last(nn.LayerNorm(CHANNELS, bias=False))),
    ],
)
def test_gain_and_bias_of_another_normalization_take_up_a_batch_norm(
    norm: Callable[[], nn.Module],
) -> None:
    model = nn.Sequential()
    model.add_module("conv", nn.Conv2d(3, CHANNELS, 1))
    model.add_module("before", norm())
    model.add_module("bn", nn.BatchNorm2d(CHANNELS))
    assert gone(drawn(model))


class _Last(nn.Module):
    """A normalization over the last axis, put over the channels."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
