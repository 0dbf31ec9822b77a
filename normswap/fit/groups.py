"""What each number of groups costs where a GroupNorm takes the place of another normalization.

After `normswap.fit.calibrate` the new module's output has the mean and the standard deviation s of
the old one's in every channel; what is left between the two is how far they move together. With r
the correlation of the old output y and x̂, the input normalized in G groups,

    E (y - ŷ)² = 2 s² (1 - r)    per channel,

and the best G of a site is the one with the least sum over its channels. Within a channel of a
sample both y and x̂ are affine in the input, so that the moments of input and output per sample and
channel give r for every G: all sites and all G take one sweep over the data.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from normswap.core.errors import NormswapError, Unsupported
from normswap.fit.batch import run
from normswap.fit.reading import Reading
from normswap.fit.site_moments import sample_moments
from normswap.graph.norm_modules import anatomy, before_tail, gain_of
from normswap.graph.snapshot import evaluating
from normswap.norms.calling import input_of


def group_errors(
    teacher: nn.Module,
    sites: Mapping[str, Sequence[int]],
    data: Iterable[Any],
    *,
    batches: int | None = None,
) -> dict[str, dict[int, float]]:
    """How far a calibrated GroupNorm stays from each normalization in `sites`, by its groups.

    Args:
        teacher: the model as it was, and stays.
        sites: paths of normalizations, each with the numbers to compare, divisors of its channels.
        data: batches of inputs, as for `normswap.fit.batch.inputs_of`.
        batches: how many of them to read, by default all.

    Returns:
        For each path and each of its numbers the squared error, as a share of the variance of the
        output; NaN where the site is never called.

    Raises:
        NormswapError: `data` is empty, an activation is not finite, the model rejects a batch, a
            number does not divide the channels, or a site has none to choose from.
    """
    fits = {path: _Fit(path, teacher.get_submodule(path), counts) for path, counts in sites.items()}
    reading = Reading(data)
    with evaluating(teacher), ExitStack() as hooks:
        for fit in fits.values():
            hooks.enter_context(fit.norm.register_forward_hook(fit.see, with_kwargs=True))
        for batch in islice(reading, batches):
            with reading.current():
                run(teacher, batch)
    if not reading.number:
        raise NormswapError("no batch to choose groups by; pass data that yields at least one")
    return {path: fit.errors() for path, fit in fits.items()}


class _Fit:
    """Sums over the data from which the residual of each number of groups follows."""

    def __init__(self, path: str, norm: nn.Module, counts: Sequence[int]) -> None:
        if not counts:
            raise NormswapError(
                f"{path!r} has no number of groups to choose from; give one or more"
            )
        try:
            self.anatomy = anatomy(norm)
        except Unsupported as error:
            raise NormswapError(f"{path!r} cannot be replaced: {error}; exclude it") from error
        self.path, self.norm, self.counts = path, norm, counts
        self._sign = torch.where(gain_of(norm).cpu() < 0, -1.0, 1.0).double()
        self._output_shift: Tensor | None = None
        self._values = 0
        # For each count: the sums of y, y^2, x̂, x̂^2 and y x̂ per channel.
        self._sums = torch.zeros(len(counts), 5, 1, dtype=torch.float64)

    def see(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        axis, x = self.anatomy.channel_axis, input_of(module, args, kwargs)
        tail = self.anatomy.tail
        value = before_tail(module, tail, (x,)) if tail else output
        mean, variance, positions = sample_moments(x, axis)
        y_mean, y_variance, _ = sample_moments(value, axis)
        if not (mean + variance + y_mean + y_variance).isfinite().all():
            raise NormswapError(
                f"{self.path!r}: the activations there are not finite; "
                "check the model's weights and the data"
            )
        if self._output_shift is None:
            self._output_shift = y_mean.mean(0)
        y = y_mean - self._output_shift, y_variance
        sums = [self._of_batch(mean, variance, *y, groups) for groups in self.counts]
        self._sums = self._sums + positions * torch.stack(sums)
        self._values += positions * len(mean)

    def _of_batch(
        self, mean: Tensor, variance: Tensor, y_mean: Tensor, y_variance: Tensor, groups: int
    ) -> Tensor:
        samples, channels = mean.shape
        if groups < 1 or channels % groups:
            raise NormswapError(
                f"{self.path!r} has {channels} channels, which {groups} groups do not divide; "
                "give divisors"
            )
        grouped = samples, groups, channels // groups
        centre = mean.view(grouped).mean(2, keepdim=True)
        off = mean.view(grouped) - centre
        spread = (variance.view(grouped) + off.square()).mean(2, keepdim=True)
        scale = (spread + getattr(self.norm, "eps", 1e-5)).rsqrt().expand(grouped).flatten(1)
        scale = scale * self._sign
        off = off.flatten(1)
        covariance = self._sign * (variance * y_variance).sqrt()
        terms = (
            y_mean,
            y_variance + y_mean.square(),
            off * scale,
            (variance + off.square()) * scale.square(),
            (covariance + y_mean * off) * scale,
        )
        return torch.stack([term.sum(0) for term in terms])

    def errors(self) -> dict[int, float]:
        if not self._values:
            return dict.fromkeys(self.counts, math.nan)
        y, yy, x, xx, xy = (self._sums / self._values).unbind(1)
        s2 = (yy - y.square()).clamp(min=0)
        tiny = torch.finfo(torch.float64).tiny
        r = (xy - x * y) / (s2 * (xx - x.square()).clamp(min=0)).clamp(min=tiny).sqrt()
        error = (2 * s2 * (1 - r)).sum(1) / s2.sum(1).clamp(min=tiny)
        return dict(zip(self.counts, error.tolist(), strict=True))
