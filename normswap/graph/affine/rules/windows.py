"""Operators that average, resize or take the maximum over other axes than the channels'."""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from normswap.graph.affine.rules.pointwise import SAME
from normswap.graph.affine.rules.rule import (
    Context,
    Equation,
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


class Summed(Window):
    """Each output is a sum over other axes than the channels', of which the example has so many.

    The shift is added up as often, so it passes where that is the same for every input.
    """

    def settle(self, node: fx.Node, known: Layouts, context: Context) -> Settled:
        (source,) = operands(node)
        shape = shape_of(source)
        axes = _reduced(node, len(shape))
        if all(_is_fixed(source, axis, context) for axis in axes):
            times = float(prod(shape[axis] for axis in axes))
            return Settled([Equation({node: 1.0, source: -times}, "its shift is added up")])
        why = "its shift would be added up, how often may depend on the size"
        return Settled(no_shift(node, source, why=why))


def _is_fixed(value: fx.Node, axis: int, context: Context) -> bool:
    """Whether an axis has the same size for every input: of a weight, or of a list of values."""
    size, sources = shape_of(value)[axis], operands(value)
    if context.constant(value) is not None:
        return True
    if value.target is aten.stack.default:
        own = int(argument(value, "dim")) % len(shape_of(value))
        return axis == own or _is_fixed(sources[0], axis - (axis > own), context)
    if value.target in _OUTPUT_AXIS:
        weight = argument(value, "weight")
        own = len(shape_of(value)) + _OUTPUT_AXIS[value.target](len(shape_of(weight)))
        return axis == own
    if value.target in _VIEWS:
        # The axes of the input that make up this one, alone or with its neighbours.
        (source,), before = sources, prod(shape_of(value)[:axis])
        start = [prod(shape_of(source)[:a]) for a in range(len(shape_of(source)))]
        return any(
            before % low == 0
            and (low * each) % (before * size) == 0
            and size > 1
            and _is_fixed(source, a, context)
            for a, (low, each) in enumerate(zip(start, shape_of(source), strict=True))
        )
    if value.target in SAME or value.target in _ELEMENTWISE:
        for source in sources:
            own = axis - (len(shape_of(value)) - len(shape_of(source)))
            if own >= 0 and shape_of(source)[own] == size > 1 and _is_fixed(source, own, context):
                return True
    return False


_VIEWS = (aten.view.default, aten.reshape.default, aten.unflatten.int)
_ELEMENTWISE = (
    *(aten.relu.default, aten.relu_.default, aten.gelu.default, aten.silu.default),
    *(aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.mul_.Tensor),
    *(aten.softmax.int, aten.sigmoid.default, aten.batch_norm.default),
)
# Where the channels of the output lie, from the end, by the number of axes of the weight.
_OUTPUT_AXIS: dict[Any, Callable[[int], int]] = {
    aten.linear.default: lambda rank: -1,
    aten.conv1d.default: lambda rank: 1 - rank,
    aten.conv2d.default: lambda rank: 1 - rank,
    aten.conv3d.default: lambda rank: 1 - rank,
}


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
    aten.sum.dim_IntList: Summed(),
    aten.sum.default: Summed(),
}
