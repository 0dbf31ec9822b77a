"""Batch-instance normalization: per channel, a learned share of either.

Nam & Kim 2018 (arXiv 1805.07925), equation 3: with x_B normalized over the batch and x_I over the
positions of one sample and channel,

    y = gamma (rho x_B + (1 - rho) x_I) + beta,    rho in [0, 1] per channel.

About the mean of each sample and channel this is one affine. With r_B and r_I the reciprocal
standard deviations, mu_I and mu_B the means:

    scale = gamma rho r_B + gamma (1 - rho) r_I,    shift = gamma rho r_B (mu_I - mu_B) + beta.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from normswap.norms.mixed.batch_and_sample import BatchAndSampleNorm
from normswap.norms.registry import register


class BatchInstanceNorm(BatchAndSampleNorm):
    """Batch-instance normalization of (N, C, ...) of any rank >= 2.

    Arguments and state-dict keys as `torch.nn.BatchNorm2d`, and `gate`, the paper's rho, (C,). It
    starts at 1, the batch's part alone, which is BatchNorm.

    An optimizer may move the gate out of [0, 1]; each training step clips it in place before using
    it, and eval mode clips what it reads, so no code is needed beyond this module's; `keep_gates`
    clips right after each step, as the paper does. The gradient is that at the clipped gate. Higher
    learning rates for gates: `normswap.param_groups`.

    Raises:
        ValueError: in training, a single value per channel.
    """

    norm_kind = "batch_instance"

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.gate = nn.Parameter(torch.ones(num_features))

    def shares(self) -> tuple[Tensor]:
        # What a functional call lends is not written to, nor is an exported graph's.
        own = isinstance(self.gate, nn.Parameter) and not torch.compiler.is_exporting()
        if not (self.training and own):
            return (self.gate.clamp(0, 1),)
        # By `data`: that a module used twice clips again changes nothing that autograd saved.
        self.gate.data.clamp_(0, 1)
        return (self.gate,)

    @staticmethod
    def written(
        eps: float,
        mean: Tensor,
        var: Tensor,
        center: Tensor,
        spread: Tensor,
        gate: Tensor,
        weight: Tensor,
        bias: Tensor,
    ) -> tuple[Tensor, Tensor]:
        share = weight * gate
        batch = share * torch.rsqrt(spread + eps)
        scale = torch.addcmul(batch, weight - share, torch.rsqrt(var + eps))
        return scale, torch.addcmul(bias, batch, mean - center)

    @staticmethod
    def forward_step(
        eps: float, mean: Tensor, var: Tensor, gate: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, ...]:
        center = mean.mean(0)
        about = mean - center
        spread = torch.addcmul(var, about, about).mean(0)
        r_batch, r_own = torch.rsqrt(spread + eps), torch.rsqrt(var + eps)
        share = weight * gate
        batch, own = share * r_batch, weight - share
        scale = torch.addcmul(batch, own, r_own)
        shift = torch.addcmul(bias, batch, about)
        return scale, shift, center, spread, about, r_batch, r_own, batch, own

    @staticmethod
    def backward_step(
        g_scale: Tensor,
        g_shift: Tensor,
        mean: Tensor,
        var: Tensor,
        gate: Tensor,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor,
        about: Tensor,
        r_batch: Tensor,
        r_own: Tensor,
        batch: Tensor,
        own: Tensor,
    ) -> tuple[Tensor, ...]:
        samples = len(mean)
        g_bias = g_shift.sum(0)
        g_batch = torch.addcmul(g_scale, g_shift, about).sum(0)
        g_r = g_scale * r_own
        g_own = g_r.sum(0)
        g_share = torch.addcmul(-g_own, g_batch, r_batch)
        # d rsqrt(v) = -1/2 rsqrt(v)^3 dv, for either variance.
        g_spread = g_batch * batch * r_batch.square() * (-0.5 / samples)
        g_var = torch.addcmul(g_spread, g_r * own, r_own.square(), value=-0.5)
        g_mean = torch.addcmul(g_bias * batch * (-1 / samples), g_shift, batch - scale)
        g_mean.addcmul_(about, g_spread, value=2)
        g_weight = torch.addcmul(g_own, g_share, gate)
        return g_mean, g_var, g_share * weight, g_weight, g_bias


def keep_gates(model: nn.Module, optimizer: Optimizer) -> RemovableHandle:
    """Clip the gates of `model` to [0, 1] right after each step of `optimizer`, as the paper does.

    Without it they are clipped when they are next used, so that between a step and the next forward
    (in a checkpoint, say) a gate may be outside.

    Returns:
        A handle whose `remove()` ends it.
    """
    gates = [module.gate for module in model.modules() if isinstance(module, BatchInstanceNorm)]

    def clip(*_: Any) -> None:
        for gate in gates:
            gate.data.clamp_(0, 1)

    return optimizer.register_step_post_hook(clip)


register(
    "batch_instance_norm",
    BatchInstanceNorm,
    keeps="exact",
    summary="a learned share of batch and instance normalization per channel",
    source="Nam & Kim 2018, arXiv 1805.07925",
    formula="gamma (rho x_B + (1 - rho) x_I) + beta, x_B, x_I: over batch, instance",
    statistics="batch and sample",
    cost="2 passes",
    needs_running=True,
    fixed=("track_running_stats",),
)
