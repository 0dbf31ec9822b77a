"""Switchable normalization: learned weights over instance, layer and batch statistics.

Luo et al. 2018 (arXiv 1806.10779), equations 3 to 5: with k in {in, ln, bn},

    y = gamma (x - sum_k w_k mu_k) / sqrt(sum_k w'_k var_k + eps) + beta,

w and w' each a softmax of three logits, shared by all channels of a layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import log
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from normswap.core.compat import softmax_backward
from normswap.core.errors import NormswapError
from normswap.norms.calling import within
from normswap.norms.mixed.batch_and_sample import BatchAndSampleNorm
from normswap.norms.moments import pooled
from normswap.norms.registry import register

Start = Literal["equal", "batch"]
OTHERS_AT_START = 1e-3  # what start="batch" leaves to instance and layer together


def _softmax(mean_weight: Tensor, var_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The softmax of both, (2, 3)."""
    return torch.stack([mean_weight, var_weight]).softmax(1, dtype=dtype)


class SwitchableNorm(BatchAndSampleNorm):
    """Switchable normalization of (N, C, ...) of any rank >= 2.

    Arguments and state-dict keys as `torch.nn.BatchNorm2d`, and `mean_weight` and `var_weight`, the
    logits, each (3,) in the order instance, layer, batch. With (N, C) an instance is one value, its
    own mean, of variance 0.

    In eval mode the batch's statistics are the running ones: the moving average, which `momentum`
    sets (None: the average over all batches of training), or the paper's batch average, which
    `averaging` takes after training.

    Args:
        start: "equal" weights, the paper's, or "batch": 0.999 for the batch and 0.0005 for either
            other, in place of a BatchNorm. Its output z + beta is then moved, to first order, by
            0.0005 [(mu_bn - mu_in) + (mu_bn - mu_ln)] gamma / sigma_bn and scaled by
            1 + 0.00025 [2 - (var_in + var_ln) / var_bn]. Where the variances of channels are of
            one order that is 0.1 %; a channel of a hundredth of the layer's variance, 2.5 %.

    Raises:
        NormswapError: an unknown start.
        ValueError: in training, a single value per channel.
    """

    norm_kind = "switchable"

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        start: Start = "equal",
    ) -> None:
        if start not in get_args(Start):
            raise NormswapError(f"start should be 'equal' or 'batch', not {start!r}")
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        logits = torch.ones(3)
        if start == "batch":
            logits[2] += log(2 * (1 - OTHERS_AT_START) / OTHERS_AT_START)
        self.mean_weight = nn.Parameter(logits)
        self.var_weight = nn.Parameter(logits.clone())

    def shares(self) -> tuple[Tensor, Tensor]:
        return self.mean_weight, self.var_weight

    @staticmethod
    def written(
        eps: float,
        mean: Tensor,
        var: Tensor,
        center: Tensor,
        spread: Tensor,
        mean_weight: Tensor,
        var_weight: Tensor,
        weight: Tensor,
        bias: Tensor,
    ) -> tuple[Tensor, Tensor]:
        (_, of_layer, of_batch), of_var = _softmax(mean_weight, var_weight, mean.dtype).unbind()
        layer_mean, layer_var = pooled(mean, var, 1)
        # The weights sum to 1, so mean - sum_k w_k mu_k = sum_k w_k (mean - mu_k).
        about = of_layer * (mean - layer_mean) + of_batch * (mean - center)
        mixed = of_var[0] * var + of_var[1] * layer_var + of_var[2] * spread
        scale = weight * torch.rsqrt(mixed + eps)
        return scale, torch.addcmul(bias, about, scale)

    @staticmethod
    def forward_step(
        eps: float,
        mean: Tensor,
        var: Tensor,
        mean_weight: Tensor,
        var_weight: Tensor,
        weight: Tensor,
        bias: Tensor,
    ) -> tuple[Tensor, ...]:
        channels = mean.shape[1]
        shares = _softmax(mean_weight, var_weight, mean.dtype)
        _, m_layer, m_batch, v_own, v_layer, v_batch = shares.view(-1).unbind()
        center = mean.mean(0)
        about_batch = mean - center
        spread = torch.addcmul(var, about_batch, about_batch).mean(0)
        about_layer = torch.sub(mean, mean.sum(1, keepdim=True), alpha=1 / channels)
        layer_sum = torch.addcmul(var, about_layer, about_layer).sum(1, keepdim=True)
        about = (about_layer * m_layer).addcmul_(about_batch, m_batch)
        mixed = torch.addcmul(spread * v_batch + eps, layer_sum, v_layer, value=1 / channels)
        rstd = mixed.addcmul_(var, v_own).rsqrt_()
        scale = rstd * weight
        shift = torch.addcmul(bias, about, scale)
        return (
            scale, shift, center, spread,
            spread, shares, about_layer, about_batch, about, layer_sum, rstd,
        )  # fmt: skip

    @staticmethod
    def backward_step(
        g_scale: Tensor,
        g_shift: Tensor,
        mean: Tensor,
        var: Tensor,
        mean_weight: Tensor,
        var_weight: Tensor,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor,
        spread: Tensor,
        shares: Tensor,
        about_layer: Tensor,
        about_batch: Tensor,
        about: Tensor,
        layer_sum: Tensor,
        rstd: Tensor,
    ) -> tuple[Tensor, ...]:
        samples, channels = mean.shape
        m_own, m_layer, m_batch, v_own, v_layer, v_batch = shares.view(-1).unbind()
        g_bias = g_shift.sum(0)
        # scale = weight rstd, shift = bias + about scale; d rstd = -1/2 rstd^3 d mixed.
        g_rstd = torch.addcmul(g_scale, g_shift, about).mul_(rstd)
        g_weight = g_rstd.sum(0)
        g_mixed = g_rstd.mul_(scale).mul_(rstd).mul_(-0.5)
        g_about = g_shift * scale
        of_batch, of_layer = g_mixed.sum(0), g_mixed.sum(1, keepdim=True)
        of_layer = of_layer * (1 / channels)
        g_shares = torch.stack(
            [
                torch.zeros_like(m_own),  # see `written`: the instance's share multiplies 0
                torch.vdot(g_about.view(-1), about_layer.view(-1)),
                torch.vdot(g_about.view(-1), about_batch.view(-1)),
                torch.vdot(g_mixed.view(-1), var.view(-1)),
                torch.vdot(of_layer.view(-1), layer_sum.view(-1)),
                torch.vdot(of_batch, spread),
            ]
        ).view(2, 3)
        g_logits = softmax_backward(g_shares, shares, 1)
        of_batch, of_layer = of_batch * v_batch, of_layer * v_layer
        g_var = torch.add(of_layer, of_batch, alpha=1 / samples).addcmul_(g_mixed, v_own)
        # Of scale (x - mean), which the output has besides, g_about is cancelled.
        g_mean = g_about * -m_own
        g_mean.addcmul_(g_about.sum(1, keepdim=True), m_layer, value=-1 / channels)
        g_mean.addcmul_(g_about.sum(0), m_batch, value=-1 / samples)
        g_mean.addcmul_(about_layer, of_layer, value=2)
        g_mean.addcmul_(about_batch, of_batch, value=2 / samples)
        return g_mean, g_var, *g_logits.unbind(), g_weight, g_bias


@contextmanager
def averaging(model: nn.Module) -> Iterator[None]:
    """The paper's batch average: forwards inside average the statistics of their batches.

    Section 3 of the paper: after training, with all parameters fixed, the statistics of some
    batches are averaged and take the place of the running ones. That is torch's cumulative average
    (momentum=None) from a reset, which the switchable normalizations of `model` do inside; all
    other modules stay in the mode they are in, so `model.eval()` first.
    """
    norms = [module for module in model.modules() if isinstance(module, SwitchableNorm)]
    for norm in norms:
        norm.reset_running_stats()
    with torch.no_grad(), within(norms, training=True, momentum=None):
        yield


register(
    "switchable_norm",
    SwitchableNorm,
    keeps="near",
    summary="learned weights over instance, layer and batch statistics",
    source="Luo et al. 2018, arXiv 1806.10779",
    formula="gamma (x - sum_k w_k mu_k) / sqrt(sum_k w'_k var_k + eps) + beta, k in {in, ln, bn}",
    statistics="batch and sample",
    cost="2 passes",
    needs_running=True,
    swap={"start": "batch"},
    fixed=("track_running_stats",),
)
