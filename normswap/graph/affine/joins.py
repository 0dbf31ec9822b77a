"""What is written into memory that an absorbed BatchNorm no longer separates.

A BatchNorm makes a new tensor. Once it is absorbed, its output is its input, and an operator that
writes into that output (an activation in place) writes into everything that shares the memory.
"""

from collections.abc import Set

from torch import fx

from normswap.core.errors import Unsupported
from normswap.graph.affine.memory import Memory


class Joins(Memory):
    """The memory of the values of one graph, as more and more operators return their input."""

    def check(self, before: fx.Node, after: fx.Node, own: Set[fx.Node]) -> None:
        """Check that the operators `own`, from `before` to `after`, may return what they are given.

        Raises:
            Unsupported: what is written into one of the two would be seen in the other.
        """
        first, second = self.storage[before], self.storage[after]
        if first is second:
            return
        where = max(self.order[node] for node in own)
        if any(self.order[node] > where for node in self.writes.get(first, ())):
            raise Unsupported("its input is overwritten while its output is needed")
        if self.writes.get(second):
            users = {user for each in self.values[first] for user in each.users} - own
            if first.op != "call_function" or any(self.order[u] > where for u in users):
                raise Unsupported("its output is written into, and its input is used as well")

    def join(self, before: fx.Node, after: fx.Node) -> None:
        """Note that `after` is `before` from now on."""
        first, second = self.storage[before], self.storage[after]
        if first is second:
            return
        for node in self.values[second]:
            self.storage[node] = first
        for kept in (self.values, self.writes):
            kept.setdefault(first, []).extend(kept.pop(second, ()))
