"""Operators that average, resize or take the maximum over other axes than the channels'."""

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor, fx

from normswap.core.errors import Unsupported
from normswap.graph.operators.operator import define, is_a
from normswap.graph.operators.rule import (
    Constraints,
    Context,
    Equation,
    Layouts,
    argument,
    has_argument,
    no_shift,
    operands,
    passes,
    shape_of,
)

aten = torch.ops.aten


class Window:
    """Each output is a mean, or a maximum, of inputs of one channel.

    Args:
        spatial: how many of the last axes it works over; None for those of its argument `dim`.
        positive: it is a maximum, which only a positive scale commutes with.
        padded: whether zeros that are not input take part, which no shift passes.
    """

    def __init__(
        self,
        spatial: int | None = None,
        *,
        positive: bool = False,
        padded: Callable[[fx.Node], bool] = lambda _: False,
    ) -> None:
        self._spatial, self.positive, self._padded = spatial, positive, padded

    def propagate(self, node: fx.Node, known: Layouts, context: Context) -> Layouts:
        source = operands(node)[0]
        if source in known:
            return {node: self._out(node, known[source])}
        return {source: self._in(node, known[node])}

    def constraints(self, node: fx.Node, known: Layouts, context: Context) -> Constraints:
        source = operands(node)[0]
        constraints = Constraints(passes(node, source))
        if self._padded(node):
            constraints.equations += no_shift(node, why="its shift meets a zero padding")
        if self.positive:
            constraints.positive.append(known[node])
        return constraints

    def _out(self, node: fx.Node, layout: Tensor) -> Tensor:
        reduced = self._reduced(node, layout.dim())
        if any(size > 1 for axis, size in enumerate(layout.shape) if axis in reduced):
            raise Unsupported("averages over the axis that it lies on")
        if len(shape_of(node)) == layout.dim():
            return layout
        return layout.view([size for axis, size in enumerate(layout.shape) if axis not in reduced])

    def _in(self, node: fx.Node, layout: Tensor) -> Tensor:
        rank = len(shape_of(operands(node)[0]))
        reduced = self._reduced(node, rank)
        if layout.dim() < rank:
            sizes = iter(layout.shape)
            layout = layout.view([1 if axis in reduced else next(sizes) for axis in range(rank)])
        if any(size > 1 for axis, size in enumerate(layout.shape) if axis in reduced):
            raise Unsupported("resizes the axis that it lies on")
        return layout

    def _reduced(self, node: fx.Node, rank: int) -> set[int]:
        """The axes that the operator works over."""
        if self._spatial is not None:
            return set(range(rank - self._spatial, rank))
        dims = argument(node, "dim") if has_argument(node, "dim") else None
        dims = range(rank) if dims in (None, []) else [dims] if isinstance(dims, int) else dims
        return {dim % rank for dim in dims}


class Summed(Window):
    """Each output is a sum over other axes than the channels', of which the example has so many.

    The shift is added up as often, so it passes where that is the same for every input.
    """

    def constraints(self, node: fx.Node, known: Layouts, context: Context) -> Constraints:
        (source,) = operands(node)
        shape = shape_of(source)
        axes = self._reduced(node, len(shape))
        if all(_is_fixed(source, axis, context) for axis in axes):
            times = float(prod(shape[axis] for axis in axes))
            return Constraints([Equation({node: 1.0, source: -times}, "its shift is added up")])
        why = "its shift would be added up, how often may depend on the size"
        return Constraints(no_shift(node, source, why=why))


def _is_fixed(value: fx.Node, axis: int, context: Context) -> bool:
    """Whether an axis has the same size for every input: of a weight, or of a list of values."""
    size, sources = shape_of(value)[axis], operands(value)
    if context.constant(value) is not None:
        return True
    if is_a(value, "stack"):
        own = int(argument(value, "dim")) % len(shape_of(value))
        return axis == own or _is_fixed(sources[0], axis - (axis > own), context)
    if is_a(value, "convolution", "linear"):  # the channels of its output
        rank = len(shape_of(argument(value, "weight")))
        return axis - len(shape_of(value)) == (1 - rank if is_a(value, "convolution") else -1)
    if is_a(value, "reshape"):
        # The axes of the input that make up this one, alone or with its neighbours.
        source, before = sources[0], prod(shape_of(value)[:axis])
        start = [prod(shape_of(source)[:a]) for a in range(len(shape_of(source)))]
        return any(
            before % low == 0
            and (low * each) % (before * size) == 0
            and size > 1
            and _is_fixed(source, a, context)
            for a, (low, each) in enumerate(zip(start, shape_of(source), strict=True))
        )
    alone = is_a(value, "same", "function", "softmax", "normalization")
    if alone or is_a(value, "sum", "product"):
        for source in sources[:1] if alone else sources:
            own = axis - (len(shape_of(value)) - len(shape_of(source)))
            if own >= 0 and shape_of(source)[own] == size > 1 and _is_fixed(source, own, context):
                return True
    return False


def _counts_padding(node: fx.Node) -> bool:
    padding = argument(node, "padding")
    padded = any(padding) if isinstance(padding, (list, tuple)) else bool(padding)
    other = (
        has_argument(node, "divisor_override") and argument(node, "divisor_override") is not None
    )
    return (padded and bool(argument(node, "count_include_pad"))) or other


_ADAPTIVE = {
    1: (aten.adaptive_avg_pool1d.default,),
    2: (aten.adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d.default),
    3: (aten.adaptive_avg_pool3d.default,),
}
_RESIZING = {
    1: (
        aten.upsample_nearest1d.default,
        aten.upsample_nearest1d.vec,
        aten.upsample_linear1d.default,
        aten.upsample_linear1d.vec,
    ),
    2: (
        aten.upsample_nearest2d.default,
        aten.upsample_nearest2d.vec,
        aten._upsample_nearest_exact2d.default,
        aten._upsample_nearest_exact2d.vec,
        aten.upsample_bilinear2d.default,
        aten.upsample_bilinear2d.vec,
        aten._upsample_bilinear2d_aa.vec,
        aten.upsample_bicubic2d.default,
        aten.upsample_bicubic2d.vec,
    ),
    3: (
        aten.upsample_nearest3d.default,
        aten.upsample_nearest3d.vec,
        aten.upsample_trilinear3d.default,
        aten.upsample_trilinear3d.vec,
    ),
}
for _spatial in (1, 2, 3):
    define("window", *_ADAPTIVE[_spatial], *_RESIZING[_spatial], rule=Window(_spatial))
define("window", aten.avg_pool1d.default, rule=Window(1, padded=_counts_padding))
define("window", aten.avg_pool2d.default, rule=Window(2, padded=_counts_padding))
define("window", aten.avg_pool3d.default, rule=Window(3, padded=_counts_padding))
define("window", aten.max_pool1d.default, rule=Window(1, positive=True))
define("window", aten.max_pool2d.default, rule=Window(2, positive=True))
define("window", aten.max_pool3d.default, rule=Window(3, positive=True))
define("window", aten.mean.dim, aten.mean.default, rule=Window())
define("window", aten.amax.default, rule=Window(positive=True))
define("window", aten.sum.dim_IntList, aten.sum.default, rule=Summed())
