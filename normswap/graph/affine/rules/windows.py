"""Operators that average, resize or take the maximum over other axes than the channels'."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from normswap.graph.affine.rules.rule import (
    Context,
    Layouts,
    Settled,
    argument,
    has_argument,
    no_shift,
    operands,
    passes,
    shape_of,
)
from normswap.graph.norm_modules import Unsupported

aten = torch.ops.aten


class Window:
    """Each output is a mean, or a maximum, of inputs of one channel.

    Args:
        positive: it is a maximum, which only a positive scale commutes with.
        padded: whether zeros that are not input take part, which no shift passes.
    """

    def __init__(
        self, *, positive: bool = False, padded: Callable[[fx.Node], bool] = lambda _: False
    ) -> None:
        self.positive, self._padded = positive, padded

    def spread(self, node: fx.Node, known: Layouts, context: Context) -> Layouts:
        source = operands(node)[0]
        if source in known:
            return {node: self._out(node, known[source])}
        return {source: self._in(node, known[node])}

    def settle(self, node: fx.Node, known: Layouts, context: Context) -> Settled:
        source = operands(node)[0]
        settled = Settled(passes(node, source))
        if self._padded(node):
            settled.equations += no_shift(node, why="its shift meets a zero padding")
        if self.positive:
            settled.positive.append(known[node])
        return settled

    def _out(self, node: fx.Node, layout: Tensor) -> Tensor:
        reduced = _reduced(node, layout.dim())
        if any(size > 1 for axis, size in enumerate(layout.shape) if axis in reduced):
            raise Unsupported("averages over the axis that it lies on")
        if len(shape_of(node)) == layout.dim():
            return layout
        return layout.view([size for axis, size in enumerate(layout.shape) if axis not in reduced])

    def _in(self, node: fx.Node, layout: Tensor) -> Tensor:
        rank = len(shape_of(operands(node)[0]))
        reduced = _reduced(node, rank)
        if layout.dim() < rank:
            sizes = iter(layout.shape)
            layout = layout.view([1 if axis in reduced else next(sizes) for axis in range(rank)])
        if any(size > 1 for axis, size in enumerate(layout.shape) if axis in reduced):
            raise Unsupported("resizes the axis that it lies on")
        return layout


def _reduced(node: fx.Node, rank: int) -> set[int]:
    """The axes that the operator works over."""
    if has_argument(node, "dim"):
        dims = argument(node, "dim")
        dims = range(rank) if dims in (None, []) else [dims] if isinstance(dims, int) else dims
        return {dim % rank for dim in dims}
    return set(range(rank - _SPATIAL.get(node.target, rank), rank))


def _counts_padding(node: fx.Node) -> bool:
    padding = argument(node, "padding")
    padded = any(padding) if isinstance(padding, (list, tuple)) else bool(padding)
    other = (
        has_argument(node, "divisor_override") and argument(node, "divisor_override") is not None
    )
    return (padded and bool(argument(node, "count_include_pad"))) or other


_AVERAGE, _MAXIMUM = Window(), Window(positive=True)
_BY_RANK: dict[int, dict[Any, Window]] = {
    1: {
        aten.avg_pool1d.default: Window(padded=_counts_padding),
        aten.adaptive_avg_pool1d.default: _AVERAGE,
        aten.max_pool1d.default: _MAXIMUM,
        aten.upsample_nearest1d.default: _AVERAGE,
        aten.upsample_nearest1d.vec: _AVERAGE,
        aten.upsample_linear1d.default: _AVERAGE,
        aten.upsample_linear1d.vec: _AVERAGE,
    },
    2: {
        aten.avg_pool2d.default: Window(padded=_counts_padding),
        aten.adaptive_avg_pool2d.default: _AVERAGE,
        aten._adaptive_avg_pool2d.default: _AVERAGE,
        aten.max_pool2d.default: _MAXIMUM,
        aten.upsample_nearest2d.default: _AVERAGE,
        aten.upsample_nearest2d.vec: _AVERAGE,
        aten._upsample_nearest_exact2d.default: _AVERAGE,
        aten._upsample_nearest_exact2d.vec: _AVERAGE,
        aten.upsample_bilinear2d.default: _AVERAGE,
        aten.upsample_bilinear2d.vec: _AVERAGE,
        aten._upsample_bilinear2d_aa.vec: _AVERAGE,
        aten.upsample_bicubic2d.default: _AVERAGE,
        aten.upsample_bicubic2d.vec: _AVERAGE,
    },
    3: {
        aten.avg_pool3d.default: Window(padded=_counts_padding),
        aten.adaptive_avg_pool3d.default: _AVERAGE,
        aten.max_pool3d.default: _MAXIMUM,
        aten.upsample_nearest3d.default: _AVERAGE,
        aten.upsample_nearest3d.vec: _AVERAGE,
        aten.upsample_trilinear3d.default: _AVERAGE,
        aten.upsample_trilinear3d.vec: _AVERAGE,
    },
}
_SPATIAL = {target: rank for rank, rows in _BY_RANK.items() for target in rows}
WINDOWS: dict[Any, Window] = {
    **{target: rule for rows in _BY_RANK.values() for target, rule in rows.items()},
    aten.mean.dim: _AVERAGE,
    aten.mean.default: _AVERAGE,
    aten.amax.default: _MAXIMUM,
}
