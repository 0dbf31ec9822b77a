"""The principal components of a stream, from data: a basis in which it is rotated.

Of the vectors that the normalizations of a stream are given, each divided by its root mean square,
the eigenvectors of the mean of x x^T, those with the largest eigenvalue first (Ashkboos et al.
2024, SliceGPT, arXiv 2401.15024, section 3.3).
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normswap.core.errors import NormswapError
from normswap.core.interrupts import at_last
from normswap.fit.batch import run
from normswap.fit.reading import Reading
from normswap.graph.norm_modules import formula
from normswap.graph.snapshot import evaluating
from normswap.passes.edits import RotateStream


class _Covariance:
    """The sum of x x^T / rms(x)^2 over the blocks of channels that normalizations are given."""

    def __init__(self, size: int) -> None:
        self.sum = torch.zeros(size, size, dtype=torch.float64)

    def see(self, axis: int, starts: tuple[int, ...], _: nn.Module, args: tuple[Any, ...]) -> None:
        """Add what a call of a normalization is given."""
        x = args[0].detach().double().movedim(axis, -1).flatten(0, -2)
        x = x * x.square().mean(-1, keepdim=True).clamp_min(1e-30).rsqrt()
        for start in starts:
            block = x[:, start : start + len(self.sum)]
            self.sum += (block.T @ block).cpu()


def principal_components(
    model: nn.Module, streams: Iterable[RotateStream], data: Iterable[Any]
) -> Mapping[str, Tensor]:
    """For each stream, by the name of its site, the orthogonal matrix (C, C) of its components.

    Args:
        streams: those to measure; one without a normalization, as the heads, is left out.
        data: batches that `model` runs on, in eval mode.

    Raises:
        NormswapError: the data have no batch, or `model` does not run on one.
    """
    found = {stream.site: _Covariance(stream.matrix.size) for stream in streams if stream.norms}
    hooks, reading = ExitStack(), Reading(data)
    with at_last(hooks.close), evaluating(model):
        for stream in streams:
            for norm in stream.norms:
                module = model.get_submodule(norm.path)
                held = formula(module)
                axis = -1 if held is None else held.channel_axis
                see = partial(found[stream.site].see, axis, norm.starts)
                hooks.enter_context(module.register_forward_pre_hook(see))
        for batch in reading:
            with reading.current():
                run(model, batch)
    if not reading.number:
        raise NormswapError("the data have no batch; give some to measure the components on")
    sums = {name: each.sum for name, each in found.items()}
    return {name: torch.linalg.eigh(sum).eigenvectors.T.flip(0) for name, sum in sums.items()}
