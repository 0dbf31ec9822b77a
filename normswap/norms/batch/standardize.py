"""What every batch normalization does in training, with its gradient written out.

    y = gain * f * (x - E) / sqrt(Var + eps) + gain * d + offset

with E and Var of each channel over the samples of a ghost batch (or of the whole batch) and all
positions, and constants f = 1 and d = 0 unless a method corrects them. As moments, mix and affine
(`normswap.norms.moments`) this would be some forty operations on small tensors, which are most of
what a step costs where the input is small; here they are twenty, in one `Function`. With
S = sum(gain f g (x - E)) and T = sum(gain f g) / sqrt(Var + eps) per channel, over all n values,

    grad x = (gain f g - S (x - E) / (n (Var + eps))) / sqrt(Var + eps) - T / n.

Compiled, or differentiated twice, it goes through the moments core.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from normswap.norms import kernels
from normswap.norms.moments import normalize, pooled
from normswap.norms.recompute import gradients

# E and 1 / sqrt(Var + eps) of the whole batch, (1, C) -> f and d, of the same shape
Correct = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def standardize(
    x: Tensor,
    gain: Tensor,
    offset: Tensor,
    eps: float,
    *,
    size: int | None = None,
    correct: Correct | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize x with the statistics of its batch.

    Args:
        x: (N, C, ...), not empty.
        gain, offset: (C,), or (N, C) for a gain and an offset of each sample, in one batch.
        eps: added to the variance.
        size: samples in a ghost batch, a divisor of N; by default N.
        correct: gives f and d, for the whole batch; no gradient flows through them.

    Returns:
        y, in the dtype of x, and the mean and (biased) variance of the k ghost batches, (k, C),
        without gradient.
    """
    size = x.shape[0] if size is None else size
    if kernels.recording():
        return _written(x, gain, offset, eps, size, correct)
    y, center, spread = _Standardize.apply(x, gain, offset, eps, size, correct)  # type: ignore[no-untyped-call]
    return y, center, spread


def _written(
    x: Tensor, gain: Tensor, offset: Tensor, eps: float, size: int, correct: Correct | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the moments core."""
    found: list[Tensor] = []

    def mix(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        shape, dim = _ghosts(mean, size)
        mean, var = mean.view(shape), var.view(shape)
        center, spread = pooled(mean, var, dim)
        rstd = torch.rsqrt(spread + eps)
        found.extend(each.detach().flatten(0, -2) for each in (center, spread))
        f, d = (1.0, 0.0) if correct is None else correct(center.detach(), rstd.detach())
        scale = gain * f * rstd
        shift = (mean - center) * scale + gain * d + offset
        return scale.expand_as(shift).flatten(0, -2), shift.flatten(0, -2)

    y = normalize(x, mix)
    return y, found[0], found[1]


class _Standardize(Function):
    """x, gain, offset -> y, center, spread."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gain: Tensor,
        offset: Tensor,
        eps: float,
        size: int,
        correct: Correct | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = kernels.moments(x)
        shape, dim = _ghosts(mean, size)
        parts = mean.view(shape)
        center = parts.mean(dim, keepdim=True)
        about = parts - center
        spread = torch.addcmul(var.view(shape), about, about).mean(dim, keepdim=True)
        rstd = (spread + eps).rsqrt_()
        factor, d = rstd, None
        center, spread = center.flatten(0, -2), spread.flatten(0, -2)
        if correct is not None:
            f, d = correct(center, rstd)
            factor, offset = rstd * f, torch.addcmul(offset, gain, d)
        scale = gain * factor
        shift = torch.addcmul(offset, about, scale).view_as(mean)
        ctx.save_for_backward(x, gain, mean, about, rstd, factor, d)
        ctx.eps, ctx.size = eps, size
        ctx.mark_non_differentiable(center, spread)
        ctx.set_materialize_grads(False)  # theirs would be zeros
        y = kernels.affine(x, mean, scale.expand_as(about).reshape_as(mean), shift)
        return y, center, spread

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 6
        x, gain, mean, about, rstd, factor, d = ctx.saved_tensors
        if torch.is_grad_enabled():
            f = None if d is None else (lambda *_: (factor / rstd, d))

            def again(x: Tensor, gain: Tensor, offset: Tensor) -> tuple[Tensor]:
                return _written(x, gain, offset, ctx.eps, ctx.size, f)[:1]

            # No gradient depends on the offset, so that any will do.
            inputs = x, gain, torch.zeros_like(gain, requires_grad=True)
            found = gradients(again, inputs, (g,), ctx.needs_input_grad[:3])
            return *found, None, None, None
        dot, total = kernels.reduce(g, x, mean)
        shape, dim = _ghosts(mean, ctx.size)
        total = total.view(shape)
        dot = torch.addcmul(dot.view(shape), total, about)  # sum(g * (x - E)) of a sample
        scale = gain * factor
        if gain.dim() == 1:  # one for all samples, whose sums are therefore enough
            dot, total = dot.sum(dim, keepdim=True), total.sum(dim, keepdim=True)
            s, t = dot * scale, total * scale
        else:
            s, t = (dot * scale).sum(dim, keepdim=True), (total * scale).sum(dim, keepdim=True)
        grad_gain = dot * factor if d is None else torch.addcmul(dot * factor, total, d)
        grads = [each.sum_to_size(gain.shape) for each in (grad_gain, total)]
        if not ctx.needs_input_grad[0]:
            return None, *grads, None, None, None
        count = ctx.size * x.shape[2:].numel()
        b = s.mul_(rstd.square()).mul_(-1 / count)
        c = torch.addcmul(t.mul_(-1 / count), about, b)
        b, scale = (each.expand_as(about).reshape_as(mean) for each in (b, scale))
        return kernels.blend(g, scale, x, mean, b, c.view_as(mean)), *grads, None, None, None


def _ghosts(mean: Tensor, size: int) -> tuple[tuple[int, ...], int]:
    """The shape in which (N, C) shows its ghost batches, and the axis of the samples in one."""
    samples, channels = mean.shape
    return ((samples, channels), 0) if size == samples else ((-1, size, channels), 1)
