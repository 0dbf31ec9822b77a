"""Mean and variance per channel, of one batch and of all batches of a sweep over the data."""

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCKS = 64  # in which a sweep's sums are kept, at most twice as many


def sample_moments(x: Tensor, channel_axis: int = 1) -> tuple[Tensor, Tensor, int]:
    """Mean and variance per sample and channel, (N, C) in float64, and the values each is over.

    `x` is (N, C, ...), or (N, ..., C) with `channel_axis` -1. With one group per channel the
    statistics of GroupNorm are these moments, in a single vectorized pass: 0.2 ms on
    (100, 16, 32, 32), where `torch.var_mean` takes 12.
    """
    x = x.detach().movedim(channel_axis, 1)
    x = (x if x.dtype == torch.float64 else x.float()).contiguous()
    samples, channels = x.shape[:2]
    positions = x.numel() // (samples * channels)
    _, mean, rstd = torch.native_group_norm(
        x, None, None, samples, channels, positions, channels, 0.0
    )
    # To the CPU first: not every device has float64.
    mean, rstd = (m.reshape(samples, channels).cpu().double() for m in (mean, rstd))
    return mean, rstd.pow(-2), positions


def merged(parts: Sequence[Tensor]) -> Tensor:
    """Count, mean and sum of squared deviations per channel, (3, C), of several (3, C) together.

    Source: Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance", eq. 2.1.
    """
    count, mean, squares = torch.stack(list(parts)).unbind(1)
    total = count.sum(0)
    centre = (count * mean).sum(0) / total.clamp(min=1)
    about = squares + count * (mean - centre).square()
    return torch.stack([total, centre, about.sum(0)])


class Moments:
    """Mean and standard deviation per channel, (C,) in float64, pooled over the batches of a sweep.

    In a later sweep over the same batches, what is added replaces the sums of the same batches in
    the sweep before, so that the moments are those of all data at any time (the idea of SAGA,
    Defazio et al. 2014, arXiv 1407.0202). For this the sums are kept by blocks of successive
    batches, the longer the more batches there are. They are sums of x - k and (x - k)^2 with k the
    mean of the first batch, so that a large mean cancels nothing.

    Attributes:
        ranks: what each process has seen, in order, as `own` gives it; None stands for this one.
    """

    def __init__(self, channels: int) -> None:
        self.first_sweep = True
        self.ranks: list[Tensor | None] = [None]
        self._shift: Tensor | None = None
        self._pooled = self._open = torch.zeros(3, channels, dtype=torch.float64)
        self._blocks: list[Tensor] = []
        self._length = 1
        self._added = 0
        self._own: Tensor | None = None  # kept until more is added

    def add(self, x: Tensor, channel_axis: int = 1) -> None:
        """Add the values of `x`, a batch or the part of it that one call sees; keep none of them.

        Raises:
            FloatingPointError: one of them is not finite.
        """
        mean, variance, positions = sample_moments(x, channel_axis)
        if self._shift is None:
            self._shift = mean.mean(0)
        mean = mean - self._shift
        count = torch.full_like(mean[0], positions * len(mean))
        squares = variance + mean.square()
        sums = torch.stack([count, positions * mean.sum(0), positions * squares.sum(0)])
        if not sums.isfinite().all():
            raise FloatingPointError("a value is not finite")
        self._open = self._open + sums
        self._own = None
        self._added += 1
        if self._added % self._length == 0:
            self._close()

    def end_sweep(self) -> None:
        """What is added from here on replaces, in order, what was added before."""
        if self._added % self._length:
            self._close()
        self.first_sweep = False
        self._own = None
        self._added = 0

    def _close(self) -> None:
        """Take the block that is full into the pooled sums."""
        index = (self._added - 1) // self._length
        if index < len(self._blocks):
            self._pooled = self._pooled + self._open - self._blocks[index]
            self._blocks[index] = self._open
        else:
            self._pooled = self._pooled + self._open
            self._blocks.append(self._open)
        self._open = torch.zeros_like(self._open)
        if self.first_sweep and len(self._blocks) == 2 * BLOCKS:
            pairs = zip(self._blocks[::2], self._blocks[1::2], strict=True)
            self._blocks = [first + second for first, second in pairs]
            self._length *= 2

    @property
    def own(self) -> Tensor:
        """Count, mean and sum of squared deviations of this process's values, (3, C)."""
        if self._own is not None:
            return self._own
        # An open block counts where none stands for it.
        sums = self._pooled + self._open if self.first_sweep else self._pooled
        count, total, squares = sums
        offset = total / count.clamp(min=1)
        about = (squares - total * offset).clamp(min=0)
        mean = offset if self._shift is None else self._shift + offset
        self._own = torch.stack([count, mean, about])
        return self._own

    def _all(self) -> Tensor:
        every = [self.own if each is None else each for each in self.ranks]
        return every[0] if len(every) == 1 else merged(every)

    @property
    def seen(self) -> bool:
        return bool(self._all()[0].any())

    @property
    def count(self) -> Tensor:
        return self._all()[0]

    @property
    def mean(self) -> Tensor:
        return self._all()[1]

    @property
    def std(self) -> Tensor:
        return self.variance.sqrt()

    @property
    def variance(self) -> Tensor:
        """Of all values as a population: divided by their count."""
        count, _, about = self._all()
        variance: Tensor = about / count.clamp(min=1)
        return variance
