"""Statistics per channel of data that come in batches, in one pass.

Chan, Golub & LeVeque 1979 (Updating formulae and a pairwise algorithm for computing sample
variances): the sums of squares about the means of two sets, A and B, give that of their union,

    S = S_A + S_B + (m_B - m_A)^2 n_A n_B / (n_A + n_B),

and the same with an outer product for a covariance. Everything is in float64, and nothing cancels
where means are large, so that it does not matter how the data are cut into batches.
"""

import torch
from torch import Tensor


class Statistics:
    """Of the values seen so far, per channel.

    Args:
        covariance: take the covariance of the channels, not only the variance of each.

    Attributes:
        count: how many values a channel has.
        mean, low, high: (C,), in float64.
    """

    def __init__(self, num_features: int, *, covariance: bool) -> None:
        nothing = torch.full((num_features,), torch.inf, dtype=torch.float64)
        self.count = 0
        self.mean = torch.zeros_like(nothing)
        self.low, self.high = nothing, -nothing
        self._squares = torch.zeros((num_features,) * (1 + covariance), dtype=torch.float64)

    @property
    def spread(self) -> Tensor:
        """The (biased) covariance, (C, C), or variance, (C,)."""
        return self._squares / self.count

    def add(self, x: Tensor) -> None:
        """Take in one batch, (N, C, ...)."""
        rows = x.to("cpu", torch.float64).transpose(0, 1).flatten(1)
        count = rows.shape[1]
        if not count:
            return
        mean = rows.mean(1)
        centered, step = rows - mean[:, None], mean - self.mean
        weight = count / (self.count + count)
        if self._squares.dim() == 2:
            squares, steps = centered @ centered.T, torch.outer(step, step)
        else:
            squares, steps = centered.square().sum(1), step.square()
        self._squares = self._squares + squares + steps * (self.count * weight)
        self.mean = self.mean + step * weight
        self.low = torch.minimum(self.low, rows.amin(1))
        self.high = torch.maximum(self.high, rows.amax(1))
        self.count += count
