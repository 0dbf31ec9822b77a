"""The passes over memory that normalizations are made of.

Each has two forms. Plain operators serve on all devices and memory formats; on the CPU, for
contiguous x, those of torch's kernels do that were measured to be fastest, used for what they also
compute. On (16, 64, 56, 56), float32, 2 cores, where a copy takes 0.23 ms: the moments 0.23 by mean
and norm, and 0.40 by group norm with one group per channel (`torch.var_mean` 7.1); the affine 0.31
by batch norm in eval mode with every sample and channel a channel of its own; the reductions 0.22
by the backward of the same (multiply and sum: 0.37).

x and g are (N, C, ...), of any rank >= 2; everything else is (N, C), contiguous, in the dtype of
the statistics.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from normswap.core.compat import differentiates_forward, is_mapped_over, is_transforming


def recording() -> bool:
    """Whether torch compiles, traces, transforms (torch.func) or differentiates forward, for which
    it wants operators."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or is_transforming()
        or differentiates_forward()
    )


def suit(x: Tensor, *with_it: Tensor) -> bool:
    """Whether torch's CPU kernels are for x: a plain tensor, contiguous, and not empty.

    Nor may it, or what is used with it, be one of many that are mapped over: torch.vmap maps a
    backward over gradients, as the older form of it does in
    torch.autograd.grad(is_grads_batched=True), of which only the tensors know.
    """
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.device.type == "cpu"
        and x.is_contiguous()
        and x.numel() > 0
        and not is_transforming()
        and not any(map(is_mapped_over, (x, *with_it)))
    )


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Inside, operators compute in the dtype of what they are given."""
    # Only where it is on: an exporter puts what such a context holds into a graph of its own.
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the statistics of x: float32 for half precision, else that of x."""
    return torch.promote_types(x.dtype, torch.float32)


def per_channel(small: Tensor, x: Tensor) -> Tensor:
    """A tensor of shape (N, C) or (C,) as one that broadcasts to x, (N, C, ...)."""
    return small.reshape(*small.shape, *[1] * (x.dim() - 2))


def positions(x: Tensor) -> tuple[int, ...]:
    """The axes of x after samples and channels."""
    return tuple(range(2, x.dim()))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """mean and (biased) var."""
    if not suit(x):
        return plain_moments(x)
    count = x.shape[2:].numel()
    # The norm is summed up one by one: of many positions it would lose digits.
    if 1 < count <= 2**16 and x.dtype == statistics_dtype(x):
        mean = x.mean(positions(x))
        square = torch.linalg.vector_norm(x, dim=positions(x)).square_()
        var = torch.addcmul(square, mean, mean, value=-count)
        # That cancels where the mean is large. Up to twice the standard deviation it costs a digit
        # of accuracy at most; beyond, or where squares overflow, it is done again.
        if torch.add(var, square, alpha=-0.2).min().item() >= 0:
            return mean, var.div_(count)
    return _moments_by_group_norm(x)


def _moments_by_group_norm(x: Tensor) -> tuple[Tensor, Tensor]:
    samples, channels = x.shape[:2]
    wide = statistics_dtype(x)
    # Weights of another dtype than x ask for statistics in theirs.
    ones = None if wide == x.dtype else x.new_ones(channels, dtype=wide)
    _, mean, rstd = torch.native_group_norm(
        x, ones, ones, samples, channels, x.shape[2:].numel(), channels, 0.0
    )
    return mean, rstd.pow(-2)  # of a constant rstd is infinite, and its power 0


def affine(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale * (x - mean) + shift."""
    if not suit(x, scale, shift):
        return plain_affine(x, scale, shift - scale * mean)
    # Any with stride 0 would send the kernel to its slow path.
    mean, scale, shift = (each.reshape(-1).contiguous() for each in (mean, scale, shift))
    out, unused = torch.empty_like(x), mean.new_empty(0)  # a view could not be written to later
    torch.ops.aten.native_batch_norm.out(
        _rows(x), scale, shift, mean, torch.ones_like(mean), False, 0.0, 0.0,
        out=_rows(out), save_mean=unused, save_invstd=unused,
    )  # fmt: skip
    return out


def reduce(g: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """sum(g * (x - mean)) and sum(g) over the positions."""
    if not suit(x, g):
        return _plain_reduce(g, x, mean)
    center = mean.reshape(-1)
    ones = torch.ones_like(center)
    _, dot, total = torch.ops.aten.native_batch_norm_backward(
        _rows(g.to(x.dtype).contiguous()), _rows(x), ones, center, ones, center, ones, False, 0.0,
        [False, True, True],
    )  # fmt: skip
    return dot.view(mean.shape), total.view(mean.shape)


def blend(g: Tensor, scale: Tensor, x: Tensor, mean: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """scale * g + b * (x - mean) + c."""
    # Half precision is widened first, to be rounded once at the end.
    blended = affine(x.to(scale.dtype), mean, b, c)
    return blended.addcmul_(g.to(scale.dtype), per_channel(scale, x)).to(x.dtype)


def plain_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """mean and var, by operators."""
    x = x.to(statistics_dtype(x))
    if x.dim() == 2:
        return x.clone(), torch.zeros_like(x)
    mean = x.mean(positions(x), keepdim=True)
    return mean.flatten(1), (x - mean).square().mean(positions(x))


def plain_affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale * x + shift, by operators."""
    scale, shift = per_channel(scale, x), per_channel(shift, x)
    return torch.addcmul(shift, x.to(shift.dtype), scale).to(x.dtype)


def _plain_reduce(g: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    g, x = g.to(mean.dtype), x.to(mean.dtype)
    dot = g * (x - per_channel(mean, x))
    if x.dim() == 2:
        return dot, g.clone()
    return dot.sum(positions(x)), g.sum(positions(x))


def _rows(x: Tensor) -> Tensor:
    """x as (1, N * C, positions)."""
    return x.view(1, x.shape[0] * x.shape[1], -1)
