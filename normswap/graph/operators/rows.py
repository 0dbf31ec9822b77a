"""Operators that pick rows by an index that is computed, or add rows up: graph convolutions.

Where the channels lie along another axis than the rows, which row comes where does not matter. A
scale passes; a shift passes what picks rows, but not a sum of however many, where it goes to the
bias behind.
"""

import torch
from torch import Tensor, fx

from normswap.core.errors import Unsupported
from normswap.graph.operators.layout import equal
from normswap.graph.operators.moving import Moving, index_of
from normswap.graph.operators.operator import define, operator_of
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


class Picking(Moving):
    """Rows of the input; with an index that is the same for every input, any elements."""

    def propagate(self, node: fx.Node, known: Layouts, context: Context) -> Layouts:
        if not is_computed(node, context):
            return super().propagate(node, known, context)
        source = operands(node)[0]
        if source in known:
            return {node: _picked(node, known[source])}
        axis, rank = _rows(node)
        layout = known[node]
        if any(size > 1 for size in layout.shape[axis : axis + rank]):
            raise Unsupported("an index that is computed lies between them")
        shape = (*layout.shape[:axis], 1, *layout.shape[axis + rank :])
        return {source: layout.view(shape)}

    def constraints(self, node: fx.Node, known: Layouts, context: Context) -> Constraints:
        if not is_computed(node, context):
            return super().constraints(node, known, context)
        source = operands(node)[0]
        if source not in known or node not in known:
            raise Unsupported("only a part of it can be followed")
        if not equal(_picked(node, known[source]), known[node]):
            raise Unsupported("only a part of it can be followed")
        return Constraints(passes(node, source))


def _index(node: fx.Node) -> list[fx.Node]:
    """The index, or the indices, of an operator."""
    name = "indices" if has_argument(node, "indices") else "index"
    index = argument(node, name)
    return [each for each in (index if isinstance(index, (list, tuple)) else [index]) if each]


def is_computed(node: fx.Node, context: Context) -> bool:
    """Whether the index by which `node` picks rows, or adds them up, is computed from the input."""
    found: dict[str, bool] = context.memory.setdefault(node, {})
    if "computed" not in found:
        try:
            for index in _index(node):
                index_of(index, context)
            found["computed"] = False
        except Unsupported:
            found["computed"] = True
    return found["computed"]


def _rows(node: fx.Node) -> tuple[int, int]:
    """The axis of the input that is picked from, and how many axes of the output come of it."""
    shape, (index, *more) = shape_of(operands(node)[0]), _index(node)
    whole = index.meta["val"].dtype not in (torch.bool, torch.uint8)  # a mask picks what it likes
    if more or not whole:
        raise Unsupported("an index that is computed lies between them")
    if node.target is aten.index.Tensor:
        return argument(node, "indices").index(index), len(shape_of(index))
    axis = int(argument(node, "dim")) % len(shape)
    if node.target is aten.gather.default and any(
        n != m for a, (n, m) in enumerate(zip(shape, shape_of(node), strict=True)) if a != axis
    ):
        raise Unsupported("an index that is computed lies between them")
    return axis, 1


def _picked(node: fx.Node, layout: Tensor) -> Tensor:
    axis, rank = _rows(node)
    if layout.shape[axis] > 1:
        raise Unsupported("an index that is computed lies between them")
    return layout.view(*layout.shape[:axis], *[1] * rank, *layout.shape[axis + 1 :])


class Scattering:
    """out = self, with each row of the source added to one of its rows."""

    def propagate(self, node: fx.Node, known: Layouts, context: Context) -> Layouts:
        changing = self._values(node)
        layout = next(known[value] for value in changing if value in known)
        axis = int(argument(node, "dim")) % layout.dim()
        if layout.shape[axis] > 1:
            raise Unsupported("the rows that it adds up are its channels")
        for value in changing:
            sizes = zip(layout.shape, shape_of(value), strict=True)
            if any(size > 1 and size != own for size, own in sizes):
                raise Unsupported("only a part of it can be followed")
        return dict.fromkeys(changing, layout)

    def constraints(self, node: fx.Node, known: Layouts, context: Context) -> Constraints:
        changing = self._values(node)
        if any(value not in known or not equal(known[value], known[node]) for value in changing):
            raise Unsupported("only a part of it can be followed")
        source, *rest = changing[1:]
        constraints = Constraints(no_shift(source, why="its shift would be added up over rows"))
        if rest:
            constraints.equations += passes(node, *rest)
        else:
            constraints.equations.append(Equation({node: 1.0}, "its shift is added to zeros"))
        return constraints

    def _values(self, node: fx.Node) -> list[fx.Node]:
        """The output, the source, and what it is added to unless that is zeros."""
        into = argument(node, "self")
        source = argument(node, "source" if has_argument(node, "source") else "src")
        if len({into, source}) < 2 or argument(node, "index") in (into, source):
            raise Unsupported("it is added to itself")
        if has_argument(node, "alpha") and argument(node, "alpha") != 1:
            raise Unsupported("a scaled sum over rows lies between them")
        filled = operator_of(into)
        if filled is not None and filled.fills == 0 and len(into.users) == 1:
            return [node, source]
        return [node, source, into]


define("pick", aten.index_select.default, rule=Picking(), along=True)
define("pick", aten.index.Tensor, aten.gather.default, rule=Picking())
define(
    "scatter",
    aten.index_add.default,
    aten.index_add_.default,
    aten.scatter_add.default,
    aten.scatter_add_.default,
    rule=Scattering(),
)
