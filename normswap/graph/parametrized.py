"""torch's parametrizations, where its own interface leaves a gap."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from normswap.core.interrupts import at_last


def parametrized_tensors(module: nn.Module) -> list[str]:
    """The names of the tensors of `module` that are parametrized."""
    if not parametrize.is_parametrized(module):
        return []
    assert isinstance(module.parametrizations, nn.ModuleDict)
    return list(module.parametrizations)


def chain_of(module: nn.Module, tensor: str) -> parametrize.ParametrizationList:
    """The parametrizations of one tensor, first to last."""
    chain = module.parametrizations[tensor]  # type: ignore[index]
    assert isinstance(chain, parametrize.ParametrizationList)
    return chain


def own_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own.

    torch keeps the property of a parametrized tensor on a class made for the module, but a deep
    copy shares that class: changing the parametrizations of one would break the other.
    """
    if parametrize.is_parametrized(module):
        cls = type(module)
        module.__class__ = type(cls.__name__, cls.__bases__, dict(vars(cls)))


def save_originals_only(module: nn.Module) -> None:
    """Keep what parametrizations compute out of the state dict of `module`.

    torch's own layers save their parameters, of which a parametrized tensor is none. A class with a
    `_save_to_state_dict` of its own, as torch_geometric's Linear, may save whatever has the name of
    its weight, which no `load_state_dict` could then place.
    """
    cls: Any = type(module)  # which torch made for this module alone
    save = cls.__bases__[0]._save_to_state_dict
    if save is nn.Module._save_to_state_dict:
        return

    def save_originals(
        self: nn.Module, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        save(self, destination, prefix, keep_vars)
        for name in parametrized_tensors(self):
            destination.pop(prefix + name, None)

    cls._save_to_state_dict = save_originals


@contextmanager
def in_eval(module: nn.Module) -> Iterator[None]:
    """With the flags of eval mode: in training, reading a spectral_norm goes on estimating."""
    flags = [(each, each.training) for each in module.modules()]

    def restore() -> None:
        for each, training in flags:
            each.training = training

    with at_last(restore):
        for each, _ in flags:
            each.training = False
        yield
