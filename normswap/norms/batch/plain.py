"""Batch normalization: mean and variance per channel, over the batch and all positions.

Ioffe & Szegedy 2015 (arXiv 1502.03167), algorithm 1, with running statistics in eval mode
(algorithm 2). In training it is moments, mix and affine (`normswap.norms.batch.standardize`),
faster than torch's own kernel, with the same function, state-dict keys and running statistics.
"""

from torch import Tensor, nn

from normswap.core.compat import AnyBatchNorm
from normswap.norms.batch.standardize import standardize
from normswap.norms.channels import check_channels, gain_and_offset
from normswap.norms.registry import register


class BatchNorm(AnyBatchNorm):
    """Batch normalization of (N, C, ...) of any rank >= 2; arguments as `torch.nn.BatchNorm2d`.

    Methods that differ from it in how the statistics of a batch are used override `with_batch`.
    """

    norm_kind = "batch"

    def forward(self, input: Tensor) -> Tensor:
        # As torch does, an empty batch passes through and teaches nothing.
        if (not self.training and self.running_mean is not None) or input.numel() == 0:
            return super().forward(input)
        values = values_per_channel(input, self.num_features)
        return self.with_batch(input, values, *gain_and_offset(self, input))

    def with_batch(self, x: Tensor, values: int, gain: Tensor, offset: Tensor) -> Tensor:
        """Normalize x with the statistics of its batch, and learn from them.

        Args:
            values: how many values of x a channel has.
            gain, offset: (C,), or (N, C).
        """
        y, center, spread = standardize(x, gain, offset, self.eps)
        self.update(center, spread, values)
        return y

    def update(self, mean: Tensor, var: Tensor, values: int) -> None:
        """Move the running statistics towards those of a batch, (1, C), if there are any.

        The variance is the unbiased one, as torch's.
        """
        if self.training and self.track_running_stats:
            unbiased = var * (values / max(values - 1, 1))
            track(self, self.momentum, running_mean=mean, running_var=unbiased)

    def _check_input_dim(self, input: Tensor) -> None:
        check_channels(input, self.num_features)


def values_per_channel(x: Tensor, num_features: int) -> int:
    """How many values of x, (N, C, ...), a statistic of one channel is taken over.

    Raises:
        ValueError: another number of channels than `num_features`, or a single value.
    """
    check_channels(x, num_features)
    values = x.shape[0] * x.shape[2:].numel()
    if values == 1:
        raise ValueError(
            f"a mean over the single value of each channel of {tuple(x.shape)} would erase the "
            "input; give a larger batch, or use eval mode"
        )
    return values


def track(module: nn.Module, momentum: float | None, **batch: Tensor) -> None:
    """Count one more batch and move the buffers of `module`, by name, towards its statistics.

    As torch does: with `momentum`, or the average of all batches where it is None.

    Args:
        batch: as many values as the buffer has.
    """
    count = module.num_batches_tracked
    if isinstance(count, Tensor):
        count.add_(1)
    for name, statistic in batch.items():
        running = getattr(module, name)
        if running is None:  # taken away, as torch lets one do, for statistics of the batch always
            continue
        weight: float | Tensor = momentum or 0.0
        if momentum is None and isinstance(count, Tensor):
            weight = count.to(running.dtype).reciprocal()
        running.lerp_(statistic.detach().reshape(running.shape).to(running.dtype), weight)


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
