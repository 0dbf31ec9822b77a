"""EvoNorm S0 and B0: a normalization and an activation in one layer.

Liu et al. 2020 (arXiv 2004.02967), table 1. With v, gamma and beta per channel:

    S0:  y = gamma x sigmoid(v x) / sqrt(Var_g[x] + eps) + beta,
    B0:  y = gamma x / max(sqrt(Var_B[x] + eps), v x + sqrt(Var_I[x] + eps)) + beta,

the variance over a group of channels of a sample (S0), over the batch, and over the positions of
one sample and channel (B0). Neither is an affine of x, whatever its parameters: what the moments
core does in one pass takes an elementwise function here, whose gradient is recomputed from x.
"""

import torch
from torch import Tensor, nn

from normswap.norms.batch.plain import track, values_per_channel
from normswap.norms.channels import AffineNorm, check_channels, gain_and_offset, with_affine
from normswap.norms.kernels import per_channel
from normswap.norms.moments import moments, pooled
from normswap.norms.recompute import recomputed
from normswap.norms.registry import register
from normswap.norms.sample.group import resolve_groups


class EvoNormS0(AffineNorm):
    """EvoNorm-S0 of (N, C, ...) of any rank >= 2; per sample.

    Args:
        num_groups: divides num_features; the paper's networks have 32.
        affine: without, gamma = 1, beta = 0; v, which shapes the activation, is there always.

    Raises:
        ValueError: a group of a single value.
    """

    norm_kind = "evonorm_s0"

    def __init__(
        self, num_groups: int, num_features: int, eps: float = 1e-5, affine: bool = True
    ) -> None:
        super().__init__(num_features)
        self.num_groups = num_groups
        self.eps = eps
        self.add_affine(affine)
        self.v = nn.Parameter(torch.ones(num_features))

    def forward(self, input: Tensor) -> Tensor:
        check_channels(input, self.num_features)
        mean, var = (
            each.reshape(-1, self.num_groups, self.num_features // self.num_groups)
            for each in moments(input)
        )
        if mean.shape[2] * input.shape[2:].numel() == 1:
            raise ValueError(
                f"EvoNorm-S0 of {tuple(input.shape)} has groups of a single value; use fewer groups"
            )
        spread = pooled(mean, var, 2)[1]
        scale = torch.rsqrt(spread + self.eps).expand_as(mean).flatten(1)
        return recomputed(_s0, input, self.v, *with_affine(self, scale))

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {super().extra_repr()}"


class EvoNormB0(AffineNorm):
    """EvoNorm-B0 of (N, C, ...) of any rank >= 2.

    Arguments and buffers as `torch.nn.BatchNorm2d`, without a running mean: the formula has none.

    Args:
        affine: without, gamma = 1, beta = 0; v, which shapes the activation, is there always.

    Raises:
        ValueError: another number of channels than `num_features`; in training, a single value per
            channel.
    """

    norm_kind = "evonorm_b0"
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        super().__init__(num_features)
        self.eps, self.momentum = eps, momentum
        self.add_affine(affine)
        self.v = nn.Parameter(torch.ones(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, input: Tensor) -> Tensor:
        mean, var = moments(input)
        if self.training and input.numel():
            values = values_per_channel(input, self.num_features)
            spread = pooled(mean, var, 0)[1]
            track(self, self.momentum, running_var=spread * (values / (values - 1)))
        else:
            check_channels(input, self.num_features)
            spread = self.running_var.to(var.dtype)
        of_batch, of_instance = torch.sqrt(spread + self.eps), torch.sqrt(var + self.eps)
        affine = gain_and_offset(self, input)
        return recomputed(_b0, input, self.v, of_batch, of_instance, *affine)


def _s0(x: Tensor, v: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale x sigmoid(v x) + shift."""
    wide = x.to(scale.dtype)
    v, scale, shift = (per_channel(each, x) for each in (v, scale, shift))
    return torch.addcmul(shift, wide * torch.sigmoid(v * wide), scale).to(x.dtype)


def _b0(
    x: Tensor, v: Tensor, of_batch: Tensor, of_instance: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """weight x / max(of_batch, v x + of_instance) + bias."""
    wide = x.to(of_batch.dtype)
    small = (v, of_batch, of_instance, weight, bias)
    v, of_batch, of_instance, weight, bias = (per_channel(each, x) for each in small)
    over = torch.maximum(of_batch, torch.addcmul(of_instance, v, wide))
    return torch.addcmul(bias, wide / over, weight).to(x.dtype)


def _evonorm_s0(
    num_features: int,
    *,
    eps: float = 1e-5,
    affine: bool = True,
    groups: int | None = None,
    channels_per_group: int | None = None,
) -> nn.Module:
    number = resolve_groups(num_features, None, groups, channels_per_group)
    return EvoNormS0(number, num_features, eps, affine)


register(
    "evonorm_s0",
    _evonorm_s0,
    keeps="calibrated",
    summary="a sigmoid-gated activation over the deviation of a group; an activation included",
    source="Liu et al. 2020, arXiv 2004.02967",
    formula="gamma x sigmoid(v x) / sqrt(Var_g[x] + eps) + beta, g: channels of a sample",
    statistics="sample",
    cost="2 passes, elementwise functions",
    values=lambda channels, positions, options: channels // options["groups"] * positions,
)
register(
    "evonorm_b0",
    EvoNormB0,
    keeps="calibrated",
    summary="over the larger of two deviations, the batch's and v x + the sample's; "
    "an activation included",
    source="Liu et al. 2020, arXiv 2004.02967",
    formula="gamma x / max(sqrt(Var_B[x] + eps), v x + sqrt(Var_nc[x] + eps)) + beta",
    statistics="batch and sample",
    cost="2 passes, elementwise functions",
    needs_running=True,
)
