"""Batch renormalization: training with the running statistics in view.

Ioffe 2017 (arXiv 1702.03275), algorithm 1. With the statistics of the batch mu_B, sigma_B and the
running ones mu, sigma,

    r = clip(sigma_B / sigma, 1 / r_max, r_max),    d = clip((mu_B - mu) / sigma, -d_max, d_max),
    y = gamma ((x - mu_B) / sigma_B * r + d) + beta,

no gradient flowing through r and d. Where nothing is clipped this is what eval mode computes,
gamma (x - mu) / sigma + beta, so small batches train what will run.

The paper averages sigma_B over batches; here it is the unbiased variance, as torch does, so that
checkpoints of both can be exchanged. sigma = sqrt(running_var + eps).
"""

from functools import partial

import torch
from torch import Tensor

from normswap.core.errors import NormswapError
from normswap.norms import kernels
from normswap.norms.batch.plain import BatchNorm
from normswap.norms.batch.standardize import standardize
from normswap.norms.registry import register

# The paper's section 4: plain BatchNorm for 5000 batches, then looser and looser limits.
SCHEDULE_START, SCHEDULE_END_R, SCHEDULE_END_D = 5_000, 40_000, 25_000


class BatchRenorm(BatchNorm):
    """Batch renormalization of (N, C, ...) of any rank >= 2, eval mode as `torch.nn.BatchNorm2d`.

    Ioffe 2017 (arXiv 1702.03275), algorithm 1.

    Args:
        momentum: 0.01 in the paper; with None the running statistics are the average of all
            batches.
        r_max, d_max: how far the scale and the mean of a batch are corrected at most.
        schedule: reach these limits as the paper does: r_max 1 and d_max 0, which is BatchNorm, for
            the first 5000 batches, then growing in proportion to the batches, to r_max at 40,000
            and to d_max at 25,000. They are counted in `num_batches_tracked`.

    Raises:
        NormswapError: r_max < 1 or d_max < 0.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        *,
        r_max: float = 3.0,
        d_max: float = 5.0,
        schedule: bool = True,
    ) -> None:
        if r_max < 1 or d_max < 0:
            raise NormswapError(
                f"batch_renorm needs r_max >= 1 and d_max >= 0, not {r_max} and {d_max}"
            )
        super().__init__(num_features, eps, momentum, affine)
        self.r_max = r_max
        self.d_max = d_max
        self.schedule = schedule

    def with_batch(self, x: Tensor, values: int, gain: Tensor, offset: Tensor) -> Tensor:
        r_max, d_max = self.limits()
        correct = None
        # Limits that are known to be 1 and 0 make it BatchNorm, as at the start of the schedule.
        if isinstance(r_max, Tensor) or r_max > 1 or d_max > 0:
            correct = partial(self.correction, r_max, d_max)
        y, center, spread = standardize(x, gain, offset, self.eps, correct=correct)
        self.update(center, spread, values)
        return y

    @torch.no_grad()
    def correction(
        self, r_max: float | Tensor, d_max: float | Tensor, center: Tensor, rstd: Tensor
    ) -> tuple[Tensor, Tensor]:
        """r and d for the mean and the reciprocal deviation of a batch, all (1, C)."""
        assert self.running_mean is not None and self.running_var is not None
        inverse = torch.rsqrt(self.running_var.to(rstd.dtype) + self.eps)
        r = inverse / rstd
        d = (center - self.running_mean) * inverse
        return r.clamp(1 / r_max, r_max), d.clamp(-d_max, d_max)  # type: ignore[arg-type]

    def limits(self) -> tuple[float | Tensor, float | Tensor]:
        """r_max and d_max as they are after the batches counted so far."""
        if not self.schedule:
            return self.r_max, self.d_max
        assert self.num_batches_tracked is not None
        count: Tensor | int = self.num_batches_tracked
        # Where it costs nothing a number; else a tensor, so that a graph that is captured once
        # serves all batches, and no device is waited for.
        if self.num_batches_tracked.device.type == "cpu" and not kernels.recording():
            count = int(self.num_batches_tracked)
        r_max = 1 + (self.r_max - 1) * _grown(count, SCHEDULE_END_R)
        return r_max, self.d_max * _grown(count, SCHEDULE_END_D)

    def extra_repr(self) -> str:
        own = f"r_max={self.r_max}, d_max={self.d_max}, schedule={self.schedule}"
        return f"{super().extra_repr()}, {own}"  # type: ignore[no-untyped-call]


def _grown(count: Tensor | int, end: int) -> Tensor | float:
    """How far the schedule is on its way, from 0 at its start to 1 at its end."""
    share = (count - SCHEDULE_START) / (end - SCHEDULE_START)
    return share.clamp(0, 1) if isinstance(share, Tensor) else min(max(share, 0.0), 1.0)


register(
    "batch_renorm",
    BatchRenorm,
    keeps="exact",
    summary="BatchNorm corrected towards its running statistics in training, for small batches",
    source="Ioffe 2017, arXiv 1702.03275",
    formula="gamma ((x - E_B[x]) / sqrt(Var_B[x] + eps) r + d) + beta, r and d clipped, constant",
    statistics="batch",
    cost="2 passes",
    needs_running=True,
    # A pretrained network's running statistics can be trusted at once.
    swap={"schedule": False},
)
