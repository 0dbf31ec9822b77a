"""The moments core: the mean and variance of each sample and channel, and an affine per each.

An activation normalization is moments, mix, affine: one pass over memory takes the moments of
x (N, C, ...), of shape (N, C); a few operations on those small tensors mix them into a scale and a
shift per sample and channel; one more pass applies these. A method is the mix, a few lines:

    normalize(x, mix):   y = scale * (x - mean) + shift,   scale, shift = mix(mean, var).

The affine is about the mean of each sample and channel, so that nothing cancels where means are
large. Backward, with g the gradient of y and M positions per channel, two reductions,

    sum(g * (x - mean)),   sum(g),

are what the mix needs to pass gradients to mean and var, and then, with b = 2 grad_var / M and
c = grad_mean / M, the gradient of x is scale * g + b * (x - mean) + c: one affine of g, one of x.
Every step is itself built of these steps, so gradients of any order exist. Only x and tensors of
shape (N, C) are saved.

In torch.compile, torch.export and torch.func the passes are plain operators, which are fused,
exported or transformed as they are; else they are those of `normswap.norms.kernels`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from normswap.norms import kernels
from normswap.norms.channels import check_rank
from normswap.norms.kernels import statistics_dtype

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance over the positions of each sample and channel.

    Args:
        x: (N, C, ...), of any rank >= 2; with (N, C) the variance is 0.

    Returns:
        mean and var, each (N, C), in float32 where x is of half precision.

    Raises:
        ValueError: x is of rank < 2.
    """
    check_rank(x)
    if kernels.recording():
        return kernels.plain_moments(x)
    mean, var = _Moments.apply(x)  # type: ignore[no-untyped-call]
    return mean, var


def channel_affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale * x + shift, in the dtype of x.

    Args:
        x: (N, C, ...), of any rank >= 2.
        scale, shift: (N, C).
    """
    check_rank(x)
    wide = statistics_dtype(x)
    scale, shift = scale.to(wide), shift.to(wide)
    if kernels.recording():
        return kernels.plain_affine(x, scale, shift)
    y: Tensor = _Affine.apply(x, torch.zeros_like(scale), scale, shift)  # type: ignore[no-untyped-call]
    return y


def normalize(x: Tensor, mix: Mix) -> Tensor:
    """scale * (x - mean) + shift with (scale, shift) = mix(mean, var), in the dtype of x.

    The same function as `moments`, `mix` and `channel_affine` one after the other, with fewer
    passes, and accurate where the mean is much larger than the standard deviation.

    Args:
        x: (N, C, ...), of any rank >= 2.
        mix: takes mean and var and returns scale and shift, all of shape (N, C) or expanding to
            it; scale and shift are about the mean of each sample and channel.
    """
    check_rank(x)
    if kernels.recording():
        mean, var = kernels.plain_moments(x)
        scale, shift = mix(mean, var)
        return kernels.plain_affine(x, scale.expand_as(mean), shift - scale * mean)
    mean, var, carrier, slot = _Open.apply(x)  # type: ignore[no-untyped-call]
    scale, shift = (each.to(mean.dtype).expand_as(mean) for each in mix(mean, var))
    y: Tensor = _Close.apply(x, carrier, slot, mean, scale, shift)  # type: ignore[no-untyped-call]
    return y


def pooled(mean: Tensor, var: Tensor, dim: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The moments of the union of equally large sets: of `mean` and `var` over `dim`, kept as 1."""
    center = mean.mean(dim, keepdim=True)
    return center, (var + (mean - center).square()).mean(dim, keepdim=True)


# --- derivatives of the passes --------------------------------------------------------------------


class _Moments(Function):
    """x -> mean, var."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = kernels.moments(x)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        count = max(x.shape[2:].numel(), 1)
        return _affine(x, mean, grad_var * (2 / count), grad_mean / count)


class _Affine(Function):
    """x, mean, scale, shift -> scale * (x - mean) + shift."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(x, mean, scale)
        return kernels.affine(x, mean, scale, shift)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        x, mean, scale = ctx.saved_tensors
        dot, total = _reduced(g, x, mean)
        zero = torch.zeros_like(scale)
        grad_x = _affine(g, zero, scale, zero) if ctx.needs_input_grad[0] else None
        return grad_x, -scale * total, dot, total


class _Reduce(Function):
    """g, x, mean -> sum(g * (x - mean)), sum(g)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        dot, total = kernels.reduce(g, x, mean)
        ctx.save_for_backward(g, x, mean, total)
        return dot, total

    @staticmethod
    def backward(ctx: Any, grad_dot: Tensor, grad_total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        g, x, mean, total = ctx.saved_tensors
        zero = torch.zeros_like(mean)
        return (
            _affine(x, mean, grad_dot, grad_total).to(g.dtype),
            _affine(g, zero, grad_dot, zero).to(x.dtype),
            -grad_dot * total,
        )


class _Open(Function):
    """x -> mean, var, carrier, slot: the first half of `normalize`.

    The last two, of the shapes of x and mean, hold nothing. Backward `_Close`, their only user,
    does not multiply its gradient by the scale but sends both here, as the "gradients" of carrier
    and slot, where the gradients of mean and var are added in the same pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, var = kernels.moments(x)
        ctx.save_for_backward(x, mean)
        return mean, var, mean.new_empty(1).expand(x.shape), torch.empty_like(mean)

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor, g: Tensor, scale: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        count = max(x.shape[2:].numel(), 1)
        blend = _Blend.apply if torch.is_grad_enabled() else kernels.blend
        grad_x: Tensor = blend(g, scale, x, mean, grad_var * (2 / count), grad_mean / count)
        return grad_x


class _Close(Function):
    """x, carrier, slot, mean, scale, shift -> scale * (x - mean) + shift: the second half."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        carrier: Tensor,
        slot: Tensor,
        mean: Tensor,
        scale: Tensor,
        shift: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, mean, scale)
        return kernels.affine(x, mean, scale, shift)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, scale = ctx.saved_tensors
        dot, total = _reduced(g, x, mean)
        return None, g, scale, -scale * total, dot, total


class _Blend(Function):
    """g, scale, x, mean, b, c -> scale * g + b * (x - mean) + c."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, scale: Tensor, x: Tensor, mean: Tensor, b: Tensor, c: Tensor
    ) -> Tensor:
        ctx.save_for_backward(g, scale, x, mean, b)
        return kernels.blend(g, scale, x, mean, b, c)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple[Tensor, ...]:
        g, scale, x, mean, b = ctx.saved_tensors
        zero = torch.zeros_like(mean)
        grad_scale, _ = _reduced(h, g, zero)
        grad_b, grad_c = _reduced(h, x, mean)
        grad_g, grad_x = _affine(h, zero, scale, zero), _affine(h, zero, b, zero)
        return grad_g, grad_scale, grad_x, -b * grad_c, grad_b, grad_c


# In an ordinary backward, which nobody differentiates again, the passes are called as they are.


def _affine(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    call = _Affine.apply if torch.is_grad_enabled() else kernels.affine
    y: Tensor = call(x, mean, scale, shift)
    return y


def _reduced(g: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    call = _Reduce.apply if torch.is_grad_enabled() else kernels.reduce
    dot, total = call(g, x, mean)
    return dot, total
