"""What torch computes in hooks is baked: the masks of pruning, wherever they are."""

from typing import Any

import pytest
import torch
from networks import Residual, in_eval, randomise
from rewritten import Layers
from torch import Tensor, nn
from torch.nn.utils import prune

import normswap as ns

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def pruned() -> nn.Module:
    """Masks on convolutions, a Linear and BatchNorms, on one of them twice."""
    torch.manual_seed(0)
    model = randomise(Residual()).double()
    prune.random_unstructured(model.first.conv, "weight", 0.3)
    prune.ln_structured(model.conv, "weight", 0.25, n=2, dim=0)
    prune.l1_unstructured(model.conv, "bias", 0.3)
    prune.random_unstructured(model.fc, "weight", 0.5)
    prune.random_unstructured(model.first.bn, "weight", 0.3)
    prune.l1_unstructured(model.first.bn, "weight", 0.2)
    prune.random_unstructured(model.bn, "bias", 0.3)
    with torch.no_grad():  # as after a step: what the hooks left is of the weights before
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


def masked(model: nn.Module) -> list[str]:
    return [name for name in model.state_dict() if name.endswith(("_orig", "_mask"))]


@pytest.mark.parametrize("verb", ["bake", "fold"])
def test_pruning_masks_are_multiplied_into_the_weights(verb: str) -> None:
    model = pruned()
    plain = ns.bake(model) if verb == "bake" else ns.fold(model, X)
    expected = in_eval(model, X)
    torch.testing.assert_close(in_eval(plain, X), expected)
    assert masked(model)
    assert not masked(plain)
    assert not any(module._forward_pre_hooks for module in plain.modules())
    assert not (plain.fc.weight.count_nonzero() > plain.fc.weight.numel() / 2)
    assert all(p.requires_grad for p in plain.parameters())


def test_what_a_forward_asks_of_a_frozen_batch_norm_stays_in_tune_mode() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.last_bn(m.last(m.bn(m.conv(x))))
        return y.relu() if hasattr(m.bn, "running_mean") else y

    layers = {"conv": nn.Conv2d(3, 4, 3), "bn": nn.BatchNorm2d(4)}
    layers |= {"last": nn.Conv2d(4, 4, 1), "last_bn": nn.BatchNorm2d(4)}
    model = randomise(Layers(forward, **layers)).double().eval()
    baked = ns.bake(ns.freeze(model, X, mode="tune"), X)
    torch.testing.assert_close(in_eval(baked, X), in_eval(model, X))
    assert hasattr(baked.bn, "running_mean")
    assert isinstance(baked.last_bn, nn.Identity)


def test_baking_gives_back_the_keys_of_the_model_before_pruning() -> None:
    baked = ns.bake(pruned())
    assert sorted(baked.state_dict()) == sorted(Residual().state_dict())
    with torch.no_grad():
        Residual().double().load_state_dict(baked.state_dict())


def test_a_weight_that_others_share_keeps_its_numbers() -> None:
    first = nn.Linear(4, 4)
    prune.random_unstructured(first, "weight", 0.5)
    second = nn.Linear(4, 4)
    second.weight = first.weight_orig
    model = nn.Sequential(first, second)
    before = second.weight.detach().clone()
    baked = ns.bake(model, inplace=True)
    assert torch.equal(baked[1].weight, before)
    assert (baked[0].weight == 0).sum() == 8


def test_a_frozen_weight_stays_frozen() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.requires_grad_(False)
    prune.random_unstructured(model[0], "weight", 0.5)
    assert not ns.bake(model)[0].weight.requires_grad


@pytest.mark.parametrize("method", ["batch_renorm", "mean_only_batch_norm"])
def test_a_pruned_batch_norm_is_replaced_with_the_gain_it_has(method: str) -> None:
    model = pruned()
    converted = ns.convert(model, method, inputs=X)
    torch.testing.assert_close(in_eval(converted, X), in_eval(model, X))
