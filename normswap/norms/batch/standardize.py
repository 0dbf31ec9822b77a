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

# center and spread, (k, 1, C) -> f and d, of the same shape
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
        gain, offset: (C,), or (N, C) for a gain and an offset of each sample.
        eps: added to the variance.
        size: samples in a ghost batch, a divisor of N; by default N.
        correct: gives f and d; no gradient flows through them.

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
        mean, var, per, plus = (_parts(each, size) for each in (mean, var, gain, offset))
        center, spread = pooled(mean, var, 1)
        found.extend(each.detach().flatten(0, 1) for each in (center, spread))
        f, d = (1.0, 0.0) if correct is None else correct(center.detach(), spread.detach())
        scale = per * f * torch.rsqrt(spread + eps)
        shift = (mean - center) * scale + per * d + plus
        return scale.expand_as(shift).flatten(0, 1), shift.flatten(0, 1)

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
        mean, var, spare = kernels.moments(x)
        per, plus, parts = _parts(gain, size), _parts(offset, size), _parts(mean, size)
        center = parts.mean(1, keepdim=True)
        about = parts - center
        spread = torch.addcmul(_parts(var, size), about, about).mean(1, keepdim=True)
        rstd = (spread + eps).rsqrt_()
        factor, d = rstd, None
        if correct is not None:
            f, d = correct(center, spread)
            factor, plus = rstd * f, torch.addcmul(plus, per, d)
        scale = per * factor
        shift = torch.addcmul(plus, about, scale).view_as(mean)
        ctx.save_for_backward(x, gain, offset, mean, about, rstd, factor, d)
        ctx.eps, ctx.size = eps, size
        center, spread = center.squeeze(1), spread.squeeze(1)
        ctx.mark_non_differentiable(center, spread)
        y = kernels.affine(x, mean, scale.expand_as(about).reshape_as(mean), shift, spare)
        return y, center, spread

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, offset, mean, about, rstd, factor, d = ctx.saved_tensors
        if torch.is_grad_enabled():
            f = None if d is None else (lambda *_: (factor / rstd, d))

            def again(x: Tensor, gain: Tensor, offset: Tensor) -> tuple[Tensor]:
                return _written(x, gain, offset, ctx.eps, ctx.size, f)[:1]

            needed = ctx.needs_input_grad[:3]
            return *gradients(again, (x, gain, offset), (g,), needed), None, None, None
        dot, total = kernels.reduce(g, x, mean)
        total, per = _parts(total, ctx.size), _parts(gain, ctx.size)
        dot = torch.addcmul(_parts(dot, ctx.size), total, about)  # sum(g * (x - E)) of a sample
        scale = per * factor
        if gain.dim() == 1:  # one for all samples, whose sums are therefore enough
            dot, total = dot.sum(1, keepdim=True), total.sum(1, keepdim=True)
            s, t = dot * scale, total * scale
        else:
            s, t = (dot * scale).sum(1, keepdim=True), (total * scale).sum(1, keepdim=True)
        grad_gain = dot * factor if d is None else torch.addcmul(dot * factor, total, d)
        grads = (each.sum_to_size(per.shape).view_as(gain) for each in (grad_gain, total))
        if not ctx.needs_input_grad[0]:
            return None, *grads, None, None, None
        count = ctx.size * x.shape[2:].numel()
        b = s.mul_(rstd.square()).mul_(-1 / count)
        c = torch.addcmul(t.mul_(-1 / count), about, b)
        b, scale = (each.expand_as(about).reshape_as(mean) for each in (b, scale))
        return kernels.blend(g, scale, x, mean, b, c.view_as(mean)), *grads, None, None, None


def _parts(small: Tensor, size: int) -> Tensor:
    """(N, C) as (k, size, C); (C,) as (1, 1, C)."""
    return small.view(1, 1, -1) if small.dim() == 1 else small.view(-1, size, small.shape[1])
