"""batch_norm is torch's BatchNorm in everything but speed."""

from inspect import signature
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import normswap as ns
from normswap.norms.batch.plain import BatchNorm

OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": None},
    {"momentum": 0.0},
    {"affine": False},
    {"track_running_stats": False},
    {"eps": 0.1},
]


def pair(**options: Any) -> tuple[nn.Module, nn.Module]:
    theirs = nn.BatchNorm2d(3, **options).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    ours = BatchNorm(3, **options).double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_outputs_gradients_and_running_statistics_are_torchs(options: dict[str, Any]) -> None:
    both = pair(**options)
    for training in (True, True, True, False):
        x, g = torch.randn(2, 5, 3, 4, 3, dtype=torch.float64).unbind(0)
        results = []
        for module in both:
            z = x.clone().requires_grad_()
            y = module.train(training)(z)
            results.append([y, *torch.autograd.grad(y, [z, *module.parameters()], g)])
        torch.testing.assert_close(*results)
        torch.testing.assert_close(both[0].state_dict(), both[1].state_dict())


def test_state_dicts_go_both_ways() -> None:
    ours, theirs = pair()
    ours(torch.randn(4, 3, 2, 2, dtype=torch.float64))
    theirs.load_state_dict(ours.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_tracking_can_be_switched_off_later() -> None:
    for module in pair():
        module.track_running_stats = False
        module(torch.randn(4, 3, 2, 2, dtype=torch.float64))
        assert module.num_batches_tracked == 0
        assert torch.equal(module.running_mean, torch.zeros(3).double())


@pytest.mark.parametrize("method", ["batch_norm", "ghost_batch_norm", "switchable_norm"])
def test_statistics_taken_away_are_those_of_the_batch_always(method: str) -> None:
    module = ns.create(method, 3)
    module.running_mean = module.running_var = None
    x = torch.randn(4, 3, 2, 2)
    expected = module(x)
    assert module.num_batches_tracked == 1
    torch.testing.assert_close(module.eval()(x), expected)


@pytest.mark.skipif("bias" not in signature(nn.BatchNorm2d).parameters, reason="a newer torch's")
def test_a_gain_without_a_bias_is_torchs() -> None:
    own, torchs = BatchNorm(5, bias=False), nn.BatchNorm2d(5, bias=False)
    nn.init.normal_(torchs.weight)
    own.load_state_dict(torchs.state_dict())
    x = torch.randn(3, 5, 4, 4)
    torch.testing.assert_close(own(x), torchs(x))


def test_a_computed_gain_is_used_in_training() -> None:
    """As of a parametrization, or of `torch.nn.utils.prune`."""
    both = pair()
    x, mask = torch.randn(4, 3, 2, 2, dtype=torch.float64), torch.tensor([1.0, 0.0, 1.0])
    for module in both:
        parametrize.register_parametrization(module, "weight", nn.Softplus())
        prune.custom_from_mask(module, "bias", mask)
    torch.testing.assert_close(*(module.train()(x) for module in both))
