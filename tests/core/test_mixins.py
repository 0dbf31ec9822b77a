"""A mixin changes what one module computes, and nothing else about it."""

import copy
import inspect
import pickle
from typing import Any

import torch
from torch import Tensor, nn

from normswap.core.mixins import Mixin, mixed

X = torch.randn(2, 3)


class Doubled(Mixin):
    _prefix = "Doubled"

    def _around(self, forward: Any, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = forward(self, *args, **kwargs)
        return 2 * y


class Shifted(Mixin):
    _prefix = "Shifted"

    def _around(self, forward: Any, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = forward(self, *args, **kwargs)
        return y + self.shift  # type: ignore[attr-defined, no-any-return]


def both() -> tuple[nn.Module, Tensor]:
    """A Linear with both mixed in, and what it computes."""
    layer = nn.Linear(3, 4)
    expected = 2 * layer(X) + 1
    layer.__class__ = mixed(Shifted, mixed(Doubled, nn.Linear))
    layer.shift = 1.0
    return layer, expected


def test_two_of_them_act_one_around_the_other() -> None:
    layer, expected = both()
    assert torch.equal(layer(X), expected)
    assert isinstance(layer, (nn.Linear, Doubled, Shifted))
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_it_can_be_copied_and_pickled_and_is_of_the_same_class() -> None:
    layer, expected = both()
    pickles = [pickle.dumps(layer, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for again in (copy.deepcopy(layer), *map(pickle.loads, pickles)):
        assert type(again) is type(layer)
        assert torch.equal(again(X), expected)


def test_its_input_keeps_its_name() -> None:
    layer, expected = both()
    assert list(inspect.signature(layer.forward).parameters) == ["input"]
    assert torch.equal(layer(input=X), expected)
