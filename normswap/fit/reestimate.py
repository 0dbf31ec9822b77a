"""The statistics that a model's BatchNorms have on other data, with the weights as they are.

The running statistics of training are a moving average of the last batches, under weights that were
moving; and data from elsewhere have others. The *population* statistics are those of all the data
at once, each BatchNorm seeing what those before it give with theirs. They depend neither on how the
data are cut into batches nor on their order.

Source: Ioffe & Szegedy 2015, arXiv 1502.03167, algorithm 2; Wu & Johnson 2021, "Rethinking 'Batch'
in BatchNorm", arXiv 2105.07576, sections 3 (population statistics) and 5 (domain shift).
"""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import NormswapError
from normswap.fit.batch import run
from normswap.fit.moments import Moments
from normswap.fit.sweeps import settle
from normswap.graph.copies import copied
from normswap.graph.norm_modules import fixed_statistics, norm_kind


def reestimate(model: nn.Module, data: Iterable[Any], *, batches: int | None = None) -> nn.Module:
    """Give every BatchNorm with running statistics those of all `data`, in place, at the end.

    A frozen BatchNorm gets them too: asking for it is asking. One that is called several times gets
    those of all its calls together. As torch has it, the running variance is that of a sample,
    divided by the count less one.

    Args:
        data: batches of inputs, as for `normswap.fit.batch.inputs_of`; no labels are needed. They
            are read once per sweep (`normswap.fit.sweeps`), from the same random state; those of an
            iterator, which ends, are kept in memory. Under torch.distributed each process reads its
            own, and all get the same statistics; one may have none.
        batches: how many batches of `data` to read, by default all.

    Returns:
        `model`; all but the running means and variances is as before, and so is the random state.

    Raises:
        NormswapError: there is no such BatchNorm, `data` is empty, an activation is not finite, or
            the model rejects a batch. The model is as before then.
    """
    twin = copied(model, share_parameters=True)  # what it sees changes no buffer of the model
    norms = dict(model.named_modules())
    sites = [
        Site(path, norm, norms[path]) for path, norm in twin.named_modules() if _is_running(norm)
    ]
    if not sites:
        raise NormswapError("the model has no BatchNorm with running statistics; nothing to do")
    for site in sites:
        site.norm.register_forward_pre_hook(site.see, prepend=False)
    title = f"re-estimating {len(sites)} BatchNorms"
    settle(sites, data, batches, (twin,), lambda batch, _: run(twin, batch), title)
    for site in sites:
        if site.seen.seen:
            site.store(site.original)
        else:
            warnings.warn(
                f"reestimate: {site.path!r} was never called and is as it was", stacklevel=2
            )
    return model


def _is_running(norm: nn.Module) -> bool:
    return norm_kind(norm) == "batch" and fixed_statistics(norm) is not None


def _statistics(norm: nn.Module) -> tuple[Tensor, Tensor]:
    held = fixed_statistics(norm)
    assert held is not None
    return held


class Site:
    """A BatchNorm of the copy, which normalizes with the moments of what it has seen so far."""

    def __init__(self, path: str, norm: nn.Module, original: nn.Module) -> None:
        self.path, self.norm, self.original = path, norm, original
        mean, _ = _statistics(norm)
        self.seen = Moments(mean.numel())
        self.moments: tuple[Moments, ...] = (self.seen,)
        self.rounding = 4 * torch.finfo(mean.dtype).eps
        self._before: tuple[Tensor, Tensor] | None = None

    def see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook: take the moments of the input, and normalize with those of all."""
        try:
            self.seen.add(args[0])
        except FloatingPointError as error:
            raise NormswapError(
                f"{self.path!r}: the activations there are not finite; check weights and data"
            ) from error
        self.store(module)

    def store(self, norm: nn.Module) -> None:
        """Give `norm` the statistics."""
        count = self.seen.count
        variance = self.seen.variance * count / (count - 1).clamp(min=1)
        for tensor, value in zip(_statistics(norm), (self.seen.mean, variance), strict=True):
            tensor.copy_(value.view_as(tensor))

    def end_sweep(self) -> float:
        """Give the copy the statistics; how far that moved them, in typical standard deviations."""
        if not self.seen.seen:
            return 0.0
        self.store(self.norm)
        mean, std = self.seen.mean, self.seen.std
        before, self._before = self._before, (mean, std)
        unit = std.square().mean().sqrt()
        if before is None or not unit:
            return float("inf") if before is None else 0.0
        moved = torch.maximum((mean - before[0]).abs(), (std - before[1]).abs())
        return float((moved / unit).max())
