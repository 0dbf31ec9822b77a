"""The gradients of each sample for Opacus, which by itself knows no layer of several outputs.

Opacus (arXiv 2109.12298) keeps what went into a layer and the gradient of what came out, and asks
a function that is registered for the layer's class for the gradients of each sample.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from normswap.core.errors import NormswapError


def register(kind: type[nn.Module]) -> None:
    """Let Opacus take networks of this class, where it has been imported."""
    opacus = sys.modules.get("opacus.grad_sample")
    if opacus is not None:
        opacus.register_grad_sampler(kind)(_gradients)


def check_hidden(module: nn.Module, hidden: Sequence[Tensor]) -> None:
    """Let a gradient of the last state be an error where Opacus listens, which would not see it."""
    if not hasattr(next(module.parameters()), "grad_sample"):
        return
    for state in hidden:
        if state.requires_grad:
            state.register_hook(_refuse)  # type: ignore[no-untyped-call]


def _refuse(gradient: Tensor | None) -> None:
    if gradient is not None and gradient.any():
        raise NormswapError(
            "Opacus sees the gradient of a recurrent network's output only, not of its last state; "
            "take the last step of the output instead"
        )


class _Output(nn.Module):
    """The outputs of a network for one sequence, without the hooks that Opacus hung on it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.network.forward(x)[0]
        return outputs


def _gradients(
    network: Any, activations: Sequence[Tensor], backprops: Tensor
) -> dict[Tensor, Tensor]:
    """For each parameter the gradients (B, ...) of the samples.

    Args:
        activations: the input (B, T, features).
        backprops: the gradient of the output (B, T, features).

    Raises:
        NormswapError: a start state was given, or dropout between the layers would be drawn anew.
    """
    if len(activations) != 1:
        raise NormswapError("Opacus takes a recurrent network without a start state only")
    if network.dropout and network.num_layers > 1:
        raise NormswapError(
            "Opacus runs a recurrent network a second time, for which its dropout would be drawn "
            "anew; set dropout = 0 on it"
        )
    output = _Output(network)
    trained = {name: each for name, each in output.named_parameters() if each.requires_grad}

    def loss(parameters: Mapping[str, Tensor], x: Tensor, gradient: Tensor) -> Tensor:
        y: Tensor = functional_call(output, dict(parameters), (x,))
        return (y * gradient).sum()

    each = vmap(grad(loss), in_dims=(None, 0, 0))(trained, activations[0], backprops)
    return {parameter: each[name] for name, parameter in trained.items()}
