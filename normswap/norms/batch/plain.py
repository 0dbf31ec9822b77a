"""Batch normalization: mean and variance per channel, over the batch and all positions.

Ioffe & Szegedy 2015 (arXiv 1502.03167), algorithm 1, with running statistics in eval mode
(algorithm 2). In training it is moments, mix and affine (`normswap.norms.moments`), faster than
torch's own kernel and the same function, state-dict keys and running statistics.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normswap.norms.moments import normalize, pooled
from normswap.norms.registry import register


class BatchNorm(_BatchNorm):
    """Batch normalization of (N, C, ...) of any rank >= 2; arguments as `torch.nn.BatchNorm2d`.

    Methods that differ from it in how the statistics of a batch are used override `mix`.
    """

    norm_kind = "batch"

    def forward(self, input: Tensor) -> Tensor:
        if not self.training and self.running_mean is not None:
            return super().forward(input)
        self._check_input_dim(input)
        values = input.numel() // max(self.num_features, 1)
        if values == 1:
            raise ValueError(
                f"BatchNorm over a single value of {tuple(input.shape)} would erase its input"
            )
        return normalize(input, lambda mean, var: self.mix(mean, var, values))

    def mix(self, mean: Tensor, var: Tensor, values: int) -> tuple[Tensor, Tensor]:
        """Scale and shift about the mean of each sample and channel, (N, C).

        Args:
            mean, var: the moments of each sample and channel, (N, C).
            values: how many values of the batch a channel has.
        """
        center, spread = pooled(mean, var, 0)
        self.update(center, spread, values)
        scale = torch.rsqrt(spread + self.eps)
        return self.affine_about(mean, center, scale)

    def affine_about(self, mean: Tensor, center: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """gamma * scale * (x - center) + beta, as scale and shift about `mean`."""
        if self.weight is not None:
            scale = scale * self.weight
        shift = (mean - center) * scale
        if self.bias is not None:
            shift = shift + self.bias
        return scale, shift

    @torch.no_grad()
    def update(self, mean: Tensor, var: Tensor, values: int) -> None:
        """Move the running statistics towards those of a batch, (1, C), if there are any.

        As torch does: with `momentum`, or the average of all batches where it is None; the
        variance is the unbiased one.
        """
        if not self.training or self.running_mean is None or self.running_var is None:
            return
        factor = self.count_batch()
        unbiased = var * (values / max(values - 1, 1))
        for running, batch in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.lerp_(batch.flatten().to(running.dtype), factor)

    def count_batch(self) -> float | Tensor:
        """Count one more batch; the weight it has in the running statistics."""
        if self.num_batches_tracked is None:
            return self.momentum or 0.0
        self.num_batches_tracked.add_(1)
        if self.momentum is not None:
            return self.momentum
        reference = self.running_mean if self.running_mean is not None else self.weight
        return 1.0 / self.num_batches_tracked.to(reference.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected (N, C, ...), got a tensor of rank {input.dim()}")


def _batch_norm(
    num_features: int,
    *,
    eps: float = 1e-5,
    affine: bool = True,
    momentum: float | None = 0.1,
    track_running_stats: bool = True,
) -> nn.Module:
    return BatchNorm(num_features, eps, momentum, affine, track_running_stats)


def _sync_batch_norm(
    num_features: int, *, eps: float = 1e-5, affine: bool = True, momentum: float | None = 0.1
) -> nn.Module:
    return nn.SyncBatchNorm(num_features, eps=eps, momentum=momentum, affine=affine)


register(
    "batch_norm",
    _batch_norm,
    keeps="exact",
    summary="mean and variance over the batch; running statistics in eval mode",
    source="Ioffe & Szegedy 2015, arXiv 1502.03167",
    formula="gamma (x - E_B[x]) / sqrt(Var_B[x] + eps) + beta",
    statistics="batch",
    cost="2 passes",
    needs_running=True,
)
register(
    "sync_batch_norm",
    _sync_batch_norm,
    keeps="exact",
    summary="BatchNorm with statistics over all processes",
    source="Peng et al. 2018, arXiv 1711.07240",
    formula="gamma (x - E_B[x]) / sqrt(Var_B[x] + eps) + beta, B over all processes",
    statistics="batch",
    cost="2 passes and a reduction over the processes",
    needs_running=True,
)
