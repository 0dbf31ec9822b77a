"""Every method is a module of its own, with the arguments and keys of its sibling in torch."""

from inspect import signature

import pytest
import torch
from torch import nn

import normswap as ns
from normswap import nn as methods

SIBLINGS: list[tuple[type[nn.Module], type[nn.Module]]] = [
    (methods.BatchNorm, nn.BatchNorm2d),
    (methods.GhostBatchNorm, nn.BatchNorm2d),
    (methods.BatchRenorm, nn.BatchNorm2d),
    (methods.ConditionalBatchNorm, nn.BatchNorm2d),
    (methods.BatchInstanceNorm, nn.BatchNorm2d),
    (methods.SwitchableNorm, nn.BatchNorm2d),
    (methods.DecorrelatedBatchNorm, nn.BatchNorm2d),
    (methods.InstanceNorm, nn.InstanceNorm2d),
]


@pytest.mark.parametrize(("own", "torchs"), SIBLINGS)
def test_positional_arguments_are_those_of_the_sibling(
    own: type[nn.Module], torchs: type[nn.Module]
) -> None:
    if own is methods.BatchRenorm:  # without running statistics there is nothing to renorm by
        expected = ["num_features", "eps", "momentum", "affine"]
    else:
        shared = ("device", "dtype", "bias")  # keywords in practice
        expected = [n for n in signature(torchs).parameters if n not in shared]
    taken = [p.name for p in signature(own).parameters.values() if p.kind != p.KEYWORD_ONLY]
    assert taken[: len(expected)] == expected


@pytest.mark.parametrize("own", [own for own, t in SIBLINGS if t is nn.BatchNorm2d])
def test_state_of_a_batch_norm_can_be_loaded(own: type[nn.Module]) -> None:
    given = nn.BatchNorm2d(6)
    nn.init.normal_(given.weight)
    given.running_mean += 3
    missing, unexpected = own(6).load_state_dict(given.state_dict(), strict=False)
    # Whitening keeps a matrix where BatchNorm has a variance.
    assert unexpected == (["running_var"] if own is methods.DecorrelatedBatchNorm else [])
    assert not set(missing) & set(given.state_dict())


def test_everything_named_is_there_and_says_what_it_is() -> None:
    for name in methods.__all__:
        assert getattr(methods, name).__doc__


def test_every_activation_method_of_our_own_has_its_class_here() -> None:
    torchs = ("torch.nn", "normswap.norms.calling")
    for name, method in ns.methods().items():
        if method.kind != "activation":
            continue
        cls = type(ns.create(name, 8))
        cls = getattr(cls, "thawed", cls)
        assert cls.__module__.startswith(torchs) or cls.__name__ in methods.__all__, name


def test_modules_work_without_the_rest_of_the_library() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), methods.SwitchableNorm(8), nn.ReLU())
    net(torch.randn(4, 3, 9, 9)).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
