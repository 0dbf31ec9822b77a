"""Ghost batch normalization: a large batch normalized in parts, as if it were several small ones.

Hoffer et al. 2017 (arXiv 1705.08741), algorithm 1. The batch is cut into ghost batches of
`ghost_batch_size` samples, in order, the last with what remains; each is normalized with its own
mean and variance. The running statistics meet the ghost batches one after another, which is the
paper's weighted sum,

    running <- (1 - m)^k running + sum_i (1 - m)^(k - i) m stat_i,    i = 1 ... k, m the momentum.

The paper averages the standard deviation; here it is the unbiased variance, as torch does, so that
checkpoints of both can be exchanged.
"""

import torch
from torch import Tensor

from normswap.core.errors import NormswapError
from normswap.norms.batch.plain import BatchNorm
from normswap.norms.batch.standardize import standardize
from normswap.norms.registry import register


class GhostBatchNorm(BatchNorm):
    """Ghost batch normalization of (N, C, ...) of any rank >= 2; eval mode is BatchNorm's.

    Hoffer et al. 2017 (arXiv 1705.08741), algorithm 1. `num_batches_tracked` counts ghost batches.

    Args:
        num_features, eps, momentum, affine, track_running_stats: as `torch.nn.BatchNorm2d`.
        ghost_batch_size: how many samples share statistics; a batch may be of any size.

    Raises:
        NormswapError: ghost_batch_size < 1.
        ValueError: in training, a ghost batch with a single value of each channel.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        ghost_batch_size: int = 32,
    ) -> None:
        if ghost_batch_size < 1:
            raise NormswapError(f"ghost_batch_size must be at least 1, not {ghost_batch_size}")
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.ghost_batch_size = ghost_batch_size

    def with_batch(self, x: Tensor, values: int, gain: Tensor, offset: Tensor) -> Tensor:
        samples, size = x.shape[0], self.ghost_batch_size
        positions, rest = values // samples, samples % size
        if positions == 1 and 1 in (rest, size):
            raise ValueError(
                f"ghost batches of {size} leave one of a single value in a batch of {samples}, "
                "which would be erased; drop the last batch, or change ghost_batch_size"
            )
        # Ghost batches of the same size are one operation, so that there are two parts at most.
        parts = [(x, min(size, samples))]
        if rest and samples > size:
            parts = [(x[: samples - rest], size), (x[samples - rest :], rest)]
        outputs = []
        for part, of_part in parts:
            y, *statistics = standardize(part, gain, offset, self.eps, size=of_part)
            for center, spread in zip(*statistics, strict=True):
                self.update(center, spread, of_part * positions)
            outputs.append(y)
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def extra_repr(self) -> str:
        own = f"ghost_batch_size={self.ghost_batch_size}"
        return f"{super().extra_repr()}, {own}"  # type: ignore[no-untyped-call]


register(
    "ghost_batch_norm",
    GhostBatchNorm,
    keeps="exact",
    summary="BatchNorm over parts of the batch, for the noise of small batches in large ones",
    source="Hoffer et al. 2017, arXiv 1705.08741",
    formula="gamma (x - E_G[x]) / sqrt(Var_G[x] + eps) + beta, G: ghost_batch_size samples of B",
    statistics="batch",
    cost="2 passes",
    needs_running=True,
    fixed=("track_running_stats",),
)
