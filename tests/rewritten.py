"""A rewritten model beside the original: it computes the same, or the verb refuses."""

from collections.abc import Callable
from typing import Any

import torch
from networks import randomise
from torch import Tensor, nn
from torch.utils import _pytree

import normswap as ns
from normswap.core.errors import NormswapError

VERBS: dict[str, Callable[[nn.Module, Any], nn.Module]] = {
    "fold": ns.fold,
    "tune": lambda model, inputs: ns.freeze(model, inputs, mode="tune"),
    "frozen": lambda model, inputs: ns.convert(model, "frozen_batch_norm", inputs=inputs),
}


class Layers(nn.Module):
    """Layers by name, and a forward over them."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def outputs(model: nn.Module, *args: Any, grad: bool, **kwargs: Any) -> list[Tensor]:
    with torch.set_grad_enabled(grad):
        return _pytree.tree_leaves(model(*args, **kwargs))


def assert_holds(
    model: nn.Module, verb: str, calls: list[tuple[Any, ...]], **attributes: Any
) -> None:
    """Rewritten for the first call it is right in all of them, or the verb refuses."""
    model = randomise(model).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # no two alike, and of both signs
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    try:
        result = VERBS[verb](model, calls[0])
    except NormswapError:
        return
    for name, value in attributes.items():
        setattr(model, name, value)
        setattr(result, name, value)
    for call in calls:
        for grad in (False, True):
            found = outputs(result, *call, grad=grad)
            for a, b in zip(found, outputs(model, *call, grad=grad), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-9 * float(b.detach().abs().max()))


def image(channels: int = 4, size: int = 6) -> Tensor:
    return torch.randn(2, channels, size, size, dtype=torch.float64)
