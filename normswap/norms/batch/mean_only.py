"""Mean-only batch normalization: the mean of the batch is subtracted, nothing is divided.

Salimans & Kingma 2016 (arXiv 1602.07868), section 4: where the weight before it holds the scale, as
with weight normalization, y = x - E_B[x] + b, with a running mean in eval mode. Sums and means are
all there is to it, so it needs none of its input for backward.
"""

import torch
from torch import Tensor, nn

from normswap.norms.batch.plain import track, values_per_channel
from normswap.norms.channels import check_channels
from normswap.norms.kernels import per_channel, positions, statistics_dtype
from normswap.norms.registry import register


class MeanOnlyBatchNorm(nn.Module):
    """Mean-only batch normalization of (N, C, ...) of any rank >= 2.

    Salimans & Kingma 2016 (arXiv 1602.07868), section 4.

    Args:
        num_features: C.
        momentum: as that of `torch.nn.BatchNorm2d`.
        affine: a trained bias.

    Raises:
        ValueError: in training, a channel with a single value, or another number of channels.
    """

    norm_kind = "batch"
    eps = 0.0  # nothing is divided
    bias: nn.Parameter | None
    running_mean: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self, num_features: int, momentum: float | None = 0.1, *, affine: bool = True
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.momentum = momentum
        self.affine, self.track_running_stats = affine, True
        bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        self.register_parameter("bias", bias)
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.numel():
            values_per_channel(input, self.num_features)
            mean = input.mean((0, *positions(input)), dtype=statistics_dtype(input))
            if self.track_running_stats:
                track(self, self.momentum, running_mean=mean)
        else:
            check_channels(input, self.num_features)
            mean = self.running_mean
        shift = -mean if self.bias is None else self.bias - mean
        return (input + per_channel(shift, input)).to(input.dtype)

    def eval_affine(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scale and shift of eval mode, each (C,)."""
        shift = -self.running_mean.to(dtype)
        if self.bias is not None:
            shift = shift + self.bias
        return torch.ones_like(shift), shift

    def extra_repr(self) -> str:
        return f"{self.num_features}, momentum={self.momentum}, affine={self.bias is not None}"


register(
    "mean_only_batch_norm",
    MeanOnlyBatchNorm,
    keeps="exact",
    summary="the batch's mean is subtracted; the scale is folded into the weight before",
    source="Salimans & Kingma 2016, arXiv 1602.07868",
    formula="x - E_B[x] + beta",
    statistics="batch",
    cost="2 passes",
    needs_running=True,
    folds_scale=True,
)
