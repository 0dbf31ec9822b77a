"""L1 batch normalization: divided by the mean absolute deviation, no squares and no roots.

Wu et al. 2018 (arXiv 1802.09769), and Hoffer et al. 2018 (arXiv 1803.01814):

    y = gamma (x - mu) / (sigma + eps) + beta,    sigma = sqrt(pi / 2) E_B|x - mu|,  mu = E_B[x].

The factor makes sigma the standard deviation where x is Gaussian. The mean absolute deviation is
about the mean of the whole batch, so that it does not follow from moments of samples as a variance
does: it is one more pass over the input, once mu is known, and one backward.
"""

from math import pi, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from normswap.norms import kernels
from normswap.norms.batch.plain import track, values_per_channel
from normswap.norms.channels import AffineNorm, check_channels
from normswap.norms.kernels import per_channel, positions, statistics_dtype
from normswap.norms.moments import normalize
from normswap.norms.registry import register

GAUSSIAN = sqrt(pi / 2)  # the standard deviation of a Gaussian by its mean absolute deviation


class L1BatchNorm(AffineNorm):
    """L1 batch normalization of (N, C, ...) of any rank >= 2.

    Wu et al. 2018 (arXiv 1802.09769). `running_deviation`, sigma, is in the place of BatchNorm's
    `running_var`.

    Args:
        num_features, momentum, affine: as `torch.nn.BatchNorm2d`.
        eps: added to sigma.

    Raises:
        ValueError: in training, a channel with a single value; another number of channels.
    """

    norm_kind = "batch"
    running_mean: Tensor
    running_deviation: Tensor
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
        self.affine, self.track_running_stats = affine, True
        self.add_affine(affine)
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_deviation", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not input.numel():
            return self._with_running(input)
        values_per_channel(input, self.num_features)

        def mix(mean: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
            center = mean.mean(0)
            sigma = GAUSSIAN * absolute_deviation(input, center)
            if self.track_running_stats:
                track(self, self.momentum, running_mean=center, running_deviation=sigma)
            scale = self._scale(sigma)
            shift = (mean - center) * scale
            return scale, shift if self.bias is None else shift + self.bias

        return normalize(input, mix)

    def _with_running(self, x: Tensor) -> Tensor:
        check_channels(x, self.num_features)
        # BatchNorm's kernel with the variance of which (sigma + eps) is the root, in wide types:
        # in half precision the square might be none.
        wide = statistics_dtype(x)
        mean, weight, bias = (
            None if each is None else each.to(wide)
            for each in (self.running_mean, self.weight, self.bias)
        )
        var = (self.running_deviation.to(wide) + self.eps).square()
        return F.batch_norm(x, mean, var, weight, bias, eps=0.0)

    @property
    def running_var(self) -> Tensor:
        """The variance with which a BatchNorm of this eps would do the same in eval mode, (C,).

        For code that reads it; it is below 0 where sigma is smaller than the root of eps.
        """
        return (self.running_deviation + self.eps).square() - self.eps

    def eval_affine(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scale and shift of eval mode, each (C,)."""
        scale = self._scale(self.running_deviation.to(dtype))
        shift = -self.running_mean.to(dtype) * scale
        return scale, shift if self.bias is None else shift + self.bias

    def _scale(self, sigma: Tensor) -> Tensor:
        scale = 1 / (sigma + self.eps)
        return scale if self.weight is None else scale * self.weight


def absolute_deviation(x: Tensor, center: Tensor) -> Tensor:
    """E|x - center| of each channel, (C,), of which only x and center are saved for backward.

    Args:
        x: (N, C, ...).
        center: (C,).
    """
    if kernels.recording():
        return _deviation(x, center)
    deviation: Tensor = _AbsoluteDeviation.apply(x, center)  # type: ignore[no-untyped-call]
    return deviation


def _deviation(x: Tensor, center: Tensor) -> Tensor:
    return (x - per_channel(center, x)).abs_().mean((0, *positions(x)))


class _AbsoluteDeviation(Function):
    """x, center -> E|x - center|; torch's own operators would keep the differences."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, center: Tensor) -> Tensor:
        ctx.save_for_backward(x, center)
        return _deviation(x, center)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, center = ctx.saved_tensors
        each = per_channel(grad * (center.numel() / x.numel()), x)
        # As far as it exists, the derivative of the sign is 0.
        grad_x = (x - per_channel(center, x)).detach().sign_() * each
        return grad_x.to(x.dtype), -grad_x.sum((0, *positions(x)))


def _adopt(new: nn.Module, old: nn.Module) -> None:
    """Let sigma + eps be the standard deviation that the BatchNorm `old` divides by."""
    if isinstance(old.running_var, Tensor):
        deviation = (old.running_var.double() + old.eps).sqrt() - new.eps  # type: ignore[operator]
        new.running_deviation.copy_(deviation)  # type: ignore[operator]


register(
    "l1_batch_norm",
    L1BatchNorm,
    keeps="exact",
    summary="BatchNorm by the mean absolute deviation, without squares and roots",
    source="Wu et al. 2018, arXiv 1802.09769",
    formula="gamma (x - E_B[x]) / (sqrt(pi / 2) E_B|x - E_B[x]| + eps) + beta",
    statistics="batch",
    cost="3 passes",
    needs_running=True,
    adopt=_adopt,
)
