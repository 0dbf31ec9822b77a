"""What travels: a matrix that mixes the channels of each group, upstream into the layer before it.

A whitening is y = D (x - mean) per group of channels. D commutes with what treats all channels
alike, and with little else; the layer that computes x folds it in, W' = D W.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from normswap.core.errors import Unsupported
from normswap.graph.index import Index
from normswap.graph.operators import is_a
from normswap.graph.operators.layout import along
from normswap.graph.operators.operator import WEIGHTED, reads_numbers, rule_of
from normswap.graph.operators.rule import Context, Folding, operands, shape_of
from normswap.graph.propagation.engine import Operators, Propagation
from normswap.graph.sites import Call


class BlockMatrix(Propagation):
    """A matrix on the channels of what one call normalizes, in their order.

    Args:
        call: it applies the matrix at present.

    Attributes:
        folding: how the layer that computes the value folds the matrix in; None until that is
            reached.
    """

    def __init__(self, index: Index, context: Context, call: Call) -> None:
        super().__init__(Operators(()), index, context)
        self.folding: Folding | None = None
        self._takers = set(call.nodes)

    def propagate_from(self, value: fx.Node, channels: int) -> Folding:
        """Follow the matrix from `value`, (N, C, ...), to the layer that folds it in.

        Raises:
            Unsupported: another takes what lies between, or an operator stops it.
        """
        self.propagate({value: along(len(shape_of(value)), 1, torch.arange(channels))})
        assert self.folding is not None  # or an operator would have stopped it
        return self.folding

    def forced(self, node: fx.Node, value: fx.Node) -> Mapping[fx.Node, Tensor]:
        if node is not value:  # it takes a value whose takers were looked at already
            return {}
        name = self.name_of(value)
        for user in value.users:
            if user not in self._takers and reads_numbers(user, value):
                raise Unsupported(f"{name} is also used by {self.name_of(user)}")
        rule = rule_of(value)
        # Those that move elements do so alike in every channel, where they keep channels apart.
        if rule is None or not is_a(value, "same", "reshape", "permute", *WEIGHTED):
            raise Unsupported(f"its input comes from {name}")
        if not is_a(value, *WEIGHTED):
            forced = dict(rule.propagate(value, self.known, self.context))
            rule.constraints(value, {**self.known, **forced}, self.context)  # raises what stops it
            self._takers.add(value)
            return {source: forced[source] for source in operands(value)[:1]}
        own = {value: self.known[value]}
        (self.folding,) = rule.constraints(value, own, self.context).foldings
        if self.folding.channel_index.channels is not None:
            raise Unsupported(f"the channels of {name} are not its own in their order")
        return {}
