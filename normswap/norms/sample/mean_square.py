"""The core of methods that scale without centering, by the mean square of each sample and channel.

The counterpart of `moments.normalize` where no mean is needed, in fewer operations: with M
positions per channel,

    rescale(x, mix):   y = scale * x + shift,   scale, shift = mix(mean(x^2)),

and backward, with g the gradient of y, the two sums that the mix needs, sum(g * x) and sum(g), and
then the gradient of x, scale * g + (2 / M) grad_square * x. With a floor y is max(y, floor), and g
is zero where the floor was larger, which backward finds again from x. Only x and tensors of shape
(N, C) or (C,) are saved. Gradients of any order exist: differentiated again, backward is operators.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from normswap.norms import kernels
from normswap.norms.channels import check_rank
from normswap.norms.kernels import per_channel, positions, statistics_dtype
from normswap.norms.moments import channel_affine

Mix = Callable[[Tensor], tuple[Tensor, Tensor]]


def rescale(x: Tensor, mix: Mix, floor: Tensor | None = None) -> Tensor:
    """max(scale * x + shift, floor) with scale, shift = mix(square), in the dtype of x.

    Args:
        x: (N, C, ...), of any rank >= 2.
        mix: takes the mean square (N, C), in float32 where x is of half precision, and returns
            scale and shift, of that shape or expanding to it.
        floor: (C,), by default none.

    Raises:
        ValueError: x is of rank < 2.
    """
    check_rank(x)
    if kernels.recording():
        square = _mean(x.to(statistics_dtype(x)).square())
        scale, shift = mix(square)
        y = channel_affine(x, scale.expand_as(square), shift.expand_as(square))
        return y if floor is None else torch.maximum(y, per_channel(floor, y).to(y.dtype))
    square, carrier = _Open.apply(x)  # type: ignore[no-untyped-call]
    scale, shift = (each.to(square.dtype).expand_as(square) for each in mix(square))
    z: Tensor = _Close.apply(x, carrier, scale, shift, floor)  # type: ignore[no-untyped-call]
    return z


class _Open(Function):
    """x -> mean square, carrier.

    The carrier, of the shape of x, holds nothing. Backward, `_Close`, its only user, sends
    scale * g here as its gradient, and the part of the mean square is added into that.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        wide = x.to(statistics_dtype(x))
        # 0.10 ms on (16, 64, 56, 56), where to square and average takes 0.4.
        norm = torch.linalg.vector_norm(wide, dim=positions(x)) if x.dim() > 2 else wide
        square = norm.square() / _count(x)
        return square, square.new_empty(1).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, grad_square: Tensor, scaled: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        slope = per_channel(grad_square * (2 / _count(x)), x)
        add = torch.addcmul if torch.is_grad_enabled() else Tensor.addcmul_
        return add(scaled, slope, x.to(slope.dtype)).to(x.dtype)


class _Close(Function):
    """x, carrier, scale, shift, floor -> max(scale * x + shift, floor)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, carrier: Tensor, scale: Tensor, shift: Tensor, floor: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, scale, shift, floor)
        y = _affine(x, scale, shift)
        if floor is None:
            return y
        return torch.maximum(y, per_channel(floor, y).to(y.dtype), out=y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, floor = ctx.saved_tensors
        if floor is None:
            return None, per_channel(scale, x) * g, *_reduce(g, x), None
        passed = _where_above(g, x, scale, shift - floor)
        dot, total = _reduce(passed, x)
        grad_floor = (_sum(g) - total).sum(0).to(floor.dtype)
        scaled = (
            passed.mul_(per_channel(scale, x)) if _fast(x, g) else per_channel(scale, x) * passed
        )
        return None, scaled, dot, total, grad_floor


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale * x + shift."""
    return kernels.affine(x, torch.zeros_like(scale), scale, shift)


def _where_above(g: Tensor, x: Tensor, scale: Tensor, margin: Tensor) -> Tensor:
    """g where scale * x + margin > 0, and 0 elsewhere."""
    with torch.no_grad():
        above = _affine(x, scale, margin)
    if _fast(x, g):
        # In place: the memory of a new tensor costs more than the operation.
        torch.ops.aten.threshold_backward.grad_input(g, above, 0.0, grad_input=above)
        return above
    passed: Tensor = torch.ops.aten.threshold_backward(g, above, 0.0)
    return passed


def _reduce(g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """sum(g * x) and sum(g) over the positions, (N, C)."""
    wide = statistics_dtype(x)
    if _fast(x, g):
        return kernels.reduce(g, x, x.new_zeros(x.shape[:2], dtype=wide))
    return _sum(g.to(wide) * x.to(wide)), _sum(g)


def _fast(x: Tensor, g: Tensor) -> bool:
    return kernels.suit(x, g) and not torch.is_grad_enabled()


def _sum(g: Tensor) -> Tensor:
    """Over the positions, (N, C)."""
    g = g.to(statistics_dtype(g))
    return g.sum(positions(g)) if g.dim() > 2 else g


def _mean(x: Tensor) -> Tensor:
    """Over the positions, (N, C)."""
    return x.mean(positions(x)) if x.dim() > 2 else x


def _count(x: Tensor) -> int:
    return max(x.shape[2:].numel(), 1)
