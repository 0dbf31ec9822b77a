"""The slope alpha of each DynamicTanh in the place of a normalization, from data.

weight * tanh(alpha x) + bias comes nearest to what the normalization gave where tanh(alpha x)
explains most of it: with y the teacher's output at the same place, the alpha of which

    sum_c cov(tanh(alpha x_c), y_c)^2 / var(tanh(alpha x_c))

is largest, the variance of y that a gain and a bias per channel explain. It is searched on a grid,
in units of the root mean square of x.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from normswap.core.interrupts import at_last
from normswap.fit.batch import run
from normswap.fit.ranks import gathered, together
from normswap.fit.reading import Reading
from normswap.graph.norm_modules import anatomy, before_tail
from normswap.graph.snapshot import evaluating
from normswap.norms.calling import input_of
from normswap.norms.pointwise.dynamic_tanh import DynamicTanh

_GRID = torch.logspace(-1.5, 0.75, 19, dtype=torch.float64)
_BATCHES, _ROWS = 8, 4096  # enough for one number


class _Slope:
    """What the sums over the data say of each slope of the grid."""

    def __init__(self, original: nn.Module) -> None:
        self._anatomy = anatomy(original)
        self.grid: Tensor | None = None
        self._sums: Tensor | None = None  # (6, slopes, C): count, t, t^2, t y, y, y^2

    def see(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        """Forward hook of the original."""
        x = input_of(module, args, kwargs)
        y = before_tail(module, self._anatomy.tail, (x,)) if self._anatomy.tail else output
        x, y = (_rows(value, self._anatomy.channel_axis) for value in (x, y))
        if self.grid is None:
            size = x.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
            self.grid = _GRID / size
        t = torch.tanh(self.grid.view(-1, 1, 1) * x)
        terms = (torch.ones_like(t), t, t.square(), t * y, y.expand_as(t), y.square().expand_as(t))
        sums = torch.stack([term.sum(1) for term in terms])
        self._sums = sums if self._sums is None else self._sums + sums

    @property
    def best(self) -> float | None:
        """The slope that explains most; None where nothing was seen, or nothing is explained."""
        if self._sums is None or self.grid is None:
            return None
        count, t, t2, ty, y, _ = self._sums
        covariance = ty / count - (t / count) * (y / count)
        variance = (t2 / count - (t / count).square()).clamp_min(1e-12)
        explained = (covariance.square() / variance).sum(-1)
        return float(self.grid[explained.argmax()]) if bool((explained > 0).any()) else None


def _rows(value: Tensor, axis: int) -> Tensor:
    """(M, C) in float64 on the CPU, M at most `_ROWS`."""
    rows = value.detach().movedim(axis, -1).flatten(0, -2)
    return rows[:: max(1, len(rows) // _ROWS)].cpu().double()


def slopes(
    teacher: nn.Module, pairs: Sequence[tuple[nn.Module, nn.Module]], data: Iterable[Any]
) -> dict[DynamicTanh, float]:
    """For each DynamicTanh among `pairs`, new and original modules, the slope that fits best.

    Args:
        data: batches that can be read more than once; the first few are.
    """
    found = {new: _Slope(old) for new, old in pairs if isinstance(new, DynamicTanh)}
    if not found:
        return {}
    hooks = ExitStack()
    with together(), at_last(hooks.close), evaluating(teacher):
        for new, old in pairs:
            if isinstance(new, DynamicTanh):
                hooks.enter_context(old.register_forward_hook(found[new].see, with_kwargs=True))
        reading = Reading(data)
        for batch in islice(reading, _BATCHES):
            with reading.current():
                run(teacher, batch)
    # Every process has its own data, and all need the same slopes: the mean of those that saw some.
    own = torch.tensor([slope.best or 0.0 for slope in found.values()], dtype=torch.float64)
    every = torch.stack(gathered(own))
    mean = every.sum(0) / (every > 0).sum(0).clamp_min(1)
    return {new: alpha for new, alpha in zip(found, mean.tolist(), strict=True) if alpha > 0}
