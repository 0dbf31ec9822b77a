"""Attention: each output position is a sum over the positions of V, with weights of a softmax.

So a scale of the channels of V passes, and a shift does where the weights add up to 1.
"""

import torch
from torch import Tensor, fx

from normswap.core.errors import Unsupported
from normswap.graph.operators.layout import equal
from normswap.graph.operators.operator import define
from normswap.graph.operators.rule import (
    Constraints,
    Context,
    Layouts,
    argument,
    no_shift,
    passes,
    shape_of,
)

aten = torch.ops.aten


class Attention:
    """out = softmax(Q K) V, with channels along the last axis of out and V."""

    def propagate(self, node: fx.Node, known: Layouts, context: Context) -> Layouts:
        values = argument(node, "value")
        if node not in known and values not in known:
            raise Unsupported("the weights of a sum over positions lie between them")
        if shape_of(values)[:-2] != shape_of(node)[:-2]:
            raise Unsupported("a product that is broadcast lies between them")
        layout = known[values] if values in known else known[node]
        _check_columns(layout)
        return {values: layout, node: layout}

    def constraints(self, node: fx.Node, known: Layouts, context: Context) -> Constraints:
        values = argument(node, "value")
        taken = [each for each in (*node.args, *node.kwargs.values()) if isinstance(each, fx.Node)]
        taken.remove(values)  # once: it may be the keys or the queries as well
        if any(each in known for each in taken):
            raise Unsupported("the weights of a sum over positions are computed from it")
        _check_columns(known[node])
        if not equal(known[node], known[values]):
            raise Unsupported("only a part of it can be followed")
        # Of a row that is masked out as a whole torch makes zeros.
        if not argument(node, "dropout_p") and argument(node, "attn_mask") is None:
            return Constraints(passes(node, values))
        return Constraints(no_shift(node, values, why="its shift meets a product without softmax"))


def _check_columns(layout: Tensor) -> None:
    if layout.shape[-2] > 1:
        raise Unsupported("a product along its channels lies between them")


define("attention", aten.scaled_dot_product_attention.default, rule=Attention())
