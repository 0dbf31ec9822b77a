"""Gradients of a function from its inputs alone: what lies between is computed again.

So that nothing else is kept for backward, and so that a gradient written by hand, which autograd
cannot see through, has a form that can be differentiated again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from normswap.norms import kernels


def recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """function(*inputs), with nothing but `inputs` saved for backward; of any order."""
    if kernels.recording():
        return function(*inputs)
    output: Tensor = _Recomputed.apply(function, *inputs)  # type: ignore[no-untyped-call]
    return output


def gradients(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor],
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients in `inputs`, where `needed`, from those in the results of function(*inputs).

    In a backward that will be differentiated again they are functions of `inputs` and `grads`.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, lest the path by which one input depends on another be followed here as well.
        own = [
            each if each is None else each.view_as(each) if again else each.detach()
            for each in inputs
        ]
        wanted = [each for each, need in zip(own, needed, strict=True) if need and each is not None]
        for each in wanted:
            each.requires_grad_()
        results = function(*own)
    differentiable = [i for i, result in enumerate(results) if result.requires_grad]
    found = iter(
        torch.autograd.grad(
            [results[i] for i in differentiable],
            wanted,
            [grads[i] for i in differentiable],
            create_graph=again,
            allow_unused=True,
        )
    )
    return tuple(next(found) if need else None for need in needed)


class _Recomputed(Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        def function(*inputs: Tensor) -> tuple[Tensor]:
            return (ctx.function(*inputs),)

        return None, *gradients(function, ctx.saved_tensors, (grad,), ctx.needs_input_grad[1:])
