"""Products that mix positions and leave channels apart: attention, A v.

Each output position is a sum over the positions of v, so a scale of the channels of v passes. A
shift passes where the weights of the sum add up to 1, as those that a softmax gives do.
"""

from typing import Any

import torch
from torch import Tensor, fx

from normswap.graph.affine.layout import equal
from normswap.graph.affine.rules.rule import (
    Context,
    Layouts,
    Rule,
    Settled,
    argument,
    no_shift,
    passes,
    shape_of,
)
from normswap.graph.affine.rules.weights import WEIGHTED, transposed_by
from normswap.graph.norm_modules import Unsupported

aten = torch.ops.aten


class Mixing:
    """out = A v, with channels along the last axis of both.

    Args:
        constant: the rule where v is a constant, which then absorbs.
    """

    def __init__(self, constant: Rule | None = None) -> None:
        self._constant = constant

    def spread(self, node: fx.Node, known: Layouts, context: Context) -> Layouts:
        values = _values(node)
        if self._constant is not None and _is_constant(values, context):
            return self._constant.spread(node, known, context)
        if node not in known and values not in known:
            raise Unsupported("the weights of a sum over positions lie between them")
        same = len(shape_of(values)) == len(shape_of(node)) and shape_of(values)[-1] > 0
        if not same or shape_of(values)[:-2] != shape_of(node)[:-2]:
            raise Unsupported("a product that is broadcast lies between them")
        layout = known[values] if values in known else known[node]
        return {values: layout, node: layout}

    def settle(self, node: fx.Node, known: Layouts, context: Context) -> Settled:
        values = _values(node)
        if self._constant is not None and _is_constant(values, context):
            return self._constant.settle(node, known, context)
        _check(node, values, known)
        if _adds_up_to_one(node, context):
            return Settled(passes(node, values))
        return Settled(no_shift(node, values, why="its shift meets a product without softmax"))


def _values(node: fx.Node) -> fx.Node:
    name = "value" if node.target is aten.scaled_dot_product_attention.default else "other"
    value = argument(node, name)
    assert isinstance(value, fx.Node)
    return value


def _is_constant(values: fx.Node, context: Context) -> bool:
    return context.constant(transposed_by(values)) is not None


def _check(node: fx.Node, values: fx.Node, known: Layouts) -> None:
    layout: Tensor = known[node]
    taken = [each for each in (*node.args, *node.kwargs.values()) if isinstance(each, fx.Node)]
    taken.remove(values)  # once: it may be the keys or the weights as well
    if any(each in known for each in taken):
        raise Unsupported("the weights of a sum over positions are computed from it")
    if layout.shape[-2] > 1:
        raise Unsupported("a product along its channels lies between them")
    if not equal(layout, known[values]):
        raise Unsupported("only a part of it can be followed")


def _adds_up_to_one(node: fx.Node, context: Context) -> bool:
    if node.target is aten.scaled_dot_product_attention.default:
        # Of a row that is masked out as a whole torch makes zeros.
        return not argument(node, "dropout_p") and argument(node, "attn_mask") is None
    weights = argument(node, "self")
    while weights.target in (aten.dropout.default, aten.clone.default):
        active = weights.target is aten.dropout.default and argument(weights, "p")
        if active and (context.training or argument(weights, "train")):
            return False
        weights = weights.args[0]
    if weights.target is not aten.softmax.int:
        return False
    return int(argument(weights, "dim")) in (-1, len(shape_of(weights)) - 1)


ATTENTION: dict[Any, Rule] = {
    aten.matmul.default: Mixing(WEIGHTED[aten.matmul.default]),
    aten.scaled_dot_product_attention.default: Mixing(),
}
