"""What is written into memory that an absorbed BatchNorm no longer separates.

A BatchNorm makes a new tensor. Once it is absorbed, its output is its input, and an operator that
writes into that output (an activation in place) writes into everything that shares the memory.
"""

from collections.abc import Set

from torch import fx

from normswap.graph.affine.memory import storage_of
from normswap.graph.affine.rules.rule import mutates
from normswap.graph.capture import Region
from normswap.graph.norm_modules import Unsupported


class Joins:
    """The memory of the values of one graph, as more and more operators return their input."""

    def __init__(self, region: Region) -> None:
        self._order = {node: position for position, node in enumerate(region.graph.nodes)}
        self._storage = {node: storage_of(node) for node in self._order}
        self._writes = {
            node: target for node in self._order if (target := mutates(node)) is not None
        }

    def check(self, before: fx.Node, after: fx.Node, own: Set[fx.Node]) -> None:
        """Check that the operators `own`, from `before` to `after`, may return what they are given.

        Raises:
            Unsupported: what is written into one of the two would be seen in the other.
        """
        first, second = self._storage[before], self._storage[after]
        if first is second:
            return
        where = max(self._order[node] for node in own)
        for node, target in self._writes.items():
            written = self._storage[target]
            if written is first and self._order[node] > where:
                raise Unsupported("its input is overwritten while its output is needed")
            if written is second:
                users = {user for each in self._in(first) for user in each.users} - own
                if first.op != "call_function" or any(self._order[u] > where for u in users):
                    raise Unsupported("its output is written into, and its input is used as well")

    def join(self, before: fx.Node, after: fx.Node) -> None:
        """Note that `after` is `before` from now on."""
        for node in self._in(self._storage[after]):
            self._storage[node] = self._storage[before]

    def _in(self, storage: fx.Node) -> list[fx.Node]:
        return [node for node, memory in self._storage.items() if memory is storage]
