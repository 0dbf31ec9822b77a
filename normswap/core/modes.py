"""Training mode and eval mode of somebody else's modules, which may have a train() of their own."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

import torch
from torch import nn

from normswap.core.interrupts import at_last


def set_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    """Put each module in training mode (True) or eval mode, parents before their children.

    A module whose class has a train() of its own is switched by it: it may choose another graph
    (torchvision's feature extractors) or another forward. Where that refuses, as the module of a
    .pt2 does, and for all others, it is the flag alone.
    """
    modes = list(modes)
    for module, training in modes:
        if module.training is not training and _has_own_train(module):
            with suppress(Exception):  # whatever a user's own raises; the flag remains
                module.train(training)
    for module, training in modes:
        module.training = training


def _has_own_train(module: nn.Module) -> bool:
    """Whether more than a flag may differ between training mode and eval mode."""
    return "train" in vars(module) or type(module).train is not nn.Module.train


@contextmanager
def flags_kept(model: nn.Module) -> Iterator[None]:
    """Whatever mode the modules are put in inside, they end in the one they began in."""
    before = [
        (module, module.training)
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    with at_last(partial(set_modes, before)):
        yield
