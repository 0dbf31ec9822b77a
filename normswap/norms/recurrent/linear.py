"""Matrix products on the CPU by oneDNN, which `torch.mm` in float32 leaves to another library.

On an AMD EPYC, with 2 threads, (16, 256) by (256, 1024) takes 30 us instead of 65, and with 2048
rows 2.2 ms instead of 5.2: recurrent networks spend half of their time there.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from normswap.norms import kernels


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T, differentiable, for x of any rank."""
    if kernels.recording() or not _suits(x, weight):
        return x @ weight.t()
    y: Tensor = _Linear.apply(x, weight)  # type: ignore[no-untyped-call]
    return y


def times(weight: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """x -> x @ weight.T, outside autograd, for many x of `rows` rows (or fewer)."""
    if not _suits(weight, weight):
        return lambda x: x @ weight.t()
    ordered = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    return lambda x: _pointwise(x, ordered)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T of two matrices, outside autograd."""
    if not _suits(x, weight):
        return x @ weight.t()
    return _pointwise(x, weight)


def _pointwise(x: Tensor, weight: Tensor) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return y


def _suits(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() > 0
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
    )


class _Linear(Function):
    """x (..., I), weight (O, I) -> x @ weight.T (..., O)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x.flatten(0, -2), weight).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors
        rows, g_rows = x.flatten(0, -2), g.flatten(0, -2)
        call = linear if torch.is_grad_enabled() else product
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = call(g_rows, weight.t()).view(x.shape)
        return grad_x, call(rows.t(), g_rows.t()).t()
