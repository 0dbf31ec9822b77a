"""The passes of the moments core by torch's own CPU kernels, used for what they also compute.

Measured on (16, 64, 56, 56), float32, 2 cores, where a copy takes 0.23 ms: the moments 0.33 by
group norm with one group per channel (`torch.var_mean` 7.1), the affine 0.31 by batch norm in eval
mode with every sample and channel a channel of its own, the reductions 0.22 by the backward of the
same (multiply and sum: 0.37).
"""

import torch
from torch import Tensor


def recording() -> bool:
    """Whether torch compiles, traces or transforms (torch.func), for which it wants operators."""
    return torch.compiler.is_compiling() or torch._C._is_tracing() or _transforming()


def suit(x: Tensor) -> bool:
    """Whether these kernels are for x, (N, C, ...): contiguous on the CPU, and not empty."""
    return x.device.type == "cpu" and x.is_contiguous() and x.numel() > 0 and not _transforming()


def moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mean and var, (N, C), and a tensor like x for further use, with nothing of use in it."""
    samples, channels, *positions = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    # Weights of another dtype than x ask for statistics in theirs.
    ones = None if wide == x.dtype else x.new_ones(channels, dtype=wide)
    spare, mean, rstd = torch.native_group_norm(
        x, ones, ones, samples, channels, torch.Size(positions).numel(), channels, 0.0
    )
    return mean, rstd.pow(-2), spare  # of a constant rstd is infinite, and its power 0


def affine(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> Tensor:
    """scale * (x - mean) + shift, in `out`, which is like x; the others are (N, C)."""
    mean, scale, shift = (each.reshape(-1) for each in (mean, scale, shift))
    unused = mean.new_empty(0)
    torch.ops.aten.native_batch_norm.out(
        _rows(x), scale, shift, mean, torch.ones_like(mean), False, 0.0, 0.0,
        out=_rows(out), save_mean=unused, save_invstd=unused,
    )  # fmt: skip
    return out


def reduce(g: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """sum(g * (x - mean)) and sum(g) over the positions, (N, C)."""
    center = mean.reshape(-1)
    ones = torch.ones_like(center)
    _, dot, total = torch.ops.aten.native_batch_norm_backward(
        _rows(g.to(x.dtype).contiguous()), _rows(x), ones, center, ones, center, ones, False, 0.0,
        [False, True, True],
    )  # fmt: skip
    return dot.view(mean.shape), total.view(mean.shape)


def _transforming() -> bool:
    # Inside a backward too: torch.autograd.grad(is_grads_batched=True) maps it over gradients.
    return torch._C._are_functorch_transforms_active()


def _rows(x: Tensor) -> Tensor:
    """x as (1, N * C, positions)."""
    return x.view(1, x.shape[0] * x.shape[1], -1)
