"""Which values of a captured graph share memory, and which operators write into it."""

from collections.abc import Set

import torch
from torch import fx

from normswap.graph.affine.rules.rule import mutates
from normswap.graph.capture import Region
from normswap.graph.norm_modules import Unsupported

aten = torch.ops.aten
# Operators that may return what they are given without saying so.
_MAY_ALIAS = (
    aten.contiguous.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.to.dtype,
    aten.to.device,
)


class Writes:
    """What is written into which memory, in one graph.

    Attributes:
        written: the values whose memory is written into.
    """

    def __init__(self, region: Region) -> None:
        self._order = {node: position for position, node in enumerate(region.graph.nodes)}
        self._storage = {node: storage_of(node) for node in self._order}
        self._writes = {
            node: self._storage[target]
            for node in self._order
            if (target := mutates(node)) is not None
        }
        self.written = frozenset(self._writes.values())

    def check(self, value: fx.Node, nodes: Set[fx.Node]) -> None:
        """Check that `nodes`, which compute from `value`, see the same and show no one else theirs.

        Raises:
            Unsupported: something is written into it between them, or by one of them.
        """
        storage = self._storage[value]
        shared = {node for node, memory in self._storage.items() if memory is storage} - nodes
        positions = [self._order[node] for node in nodes]
        for node, written in self._writes.items():
            if written is not storage:
                continue
            if node in nodes:
                users = {user for each in shared for user in each.users}
                if storage.op == "placeholder" or not users <= nodes | shared:
                    raise Unsupported("it is written into its input, which others see")
            elif min(positions) < self._order[node] < max(positions):
                raise Unsupported("its input is overwritten between the branches")


def storage_of(node: fx.Node) -> fx.Node:
    """The value whose memory `node` is in."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        schema = getattr(node.target, "_schema", None)  # a getitem has none
        aliases = schema is None or any(each.alias_info is not None for each in schema.returns)
        if not aliases and node.target not in _MAY_ALIAS:
            break
        node = node.args[0]
    return node
