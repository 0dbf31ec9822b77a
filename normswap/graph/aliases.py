"""Which values of a captured graph share memory, and which operators write into it.

A BatchNorm makes a new tensor. Once it is folded, its output is its input, and an operator that
writes into that output (an activation in place) writes into everything that shares the memory.
"""

import copy
from collections.abc import Sequence, Set

from torch import fx

from normswap.core.errors import Unsupported
from normswap.graph.operators import operator_of
from normswap.graph.operators.rule import mutates


class AliasAnalysis:
    """The memory that the values of one graph are in, as more operators return their input.

    Attributes:
        written: the values whose memory is written into, as captured.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._order = {node: position for position, node in enumerate(graph.nodes)}
        # Of each value, the one whose memory it is in; of each of those, all the values in it, and
        # the operators that write into it.
        self._storage: dict[fx.Node, fx.Node] = {}
        self._values: dict[fx.Node, list[fx.Node]] = {}
        self._writes: dict[fx.Node, list[fx.Node]] = {}
        for node in self._order:
            source = _source(node)
            storage = self._storage[node] = node if source is None else self._storage[source]
            self._values.setdefault(storage, []).append(node)
            target = mutates(node)
            if target is not None:
                self._writes.setdefault(self._storage[target], []).append(node)
        self.written = frozenset(self._writes)

    def copy(self) -> "AliasAnalysis":
        """The same, of which `passed` changes nothing here."""
        twin = copy.copy(self)
        twin._storage = dict(self._storage)
        for name in ("_values", "_writes"):
            setattr(twin, name, {key: list(each) for key, each in getattr(self, name).items()})
        return twin

    def writes(self, value: fx.Node) -> Sequence[fx.Node]:
        """The operators that write into the memory of `value`."""
        return self._writes.get(self._storage[value], ())

    def check_computed(self, value: fx.Node, nodes: Set[fx.Node]) -> None:
        """Check that `nodes`, which compute from `value`, see the same and show no one else theirs.

        Raises:
            Unsupported: something is written into it between them, or by one of them.
        """
        storage = self._storage[value]
        shared = set(self._values[storage]) - nodes
        positions = [self._order[node] for node in nodes]
        for node in self.writes(value):
            if node in nodes:
                users = {user for each in shared for user in each.users}
                if storage.op == "placeholder" or not users <= nodes | shared:
                    raise Unsupported("it is written into its input, which others see")
            elif min(positions) < self._order[node] < max(positions):
                raise Unsupported("its input is overwritten between the branches")

    def check_passed(self, before: fx.Node, after: fx.Node, own: Set[fx.Node]) -> None:
        """Check that the operators `own`, from `before` to `after`, may return what they are given.

        Raises:
            Unsupported: what is written into one of the two would be seen in the other.
        """
        first, second = self._storage[before], self._storage[after]
        if first is second:
            return
        where = max(self._order[node] for node in own)
        if any(self._order[node] > where for node in self._writes.get(first, ())):
            raise Unsupported("its input is overwritten while its output is needed")
        if self._writes.get(second):
            users = {user for each in self._values[first] for user in each.users} - own
            if first.op != "call_function" or any(self._order[u] > where for u in users):
                raise Unsupported("its output is written into, and its input is used as well")

    def passed(self, before: fx.Node, after: fx.Node) -> None:
        """Note that `after` is `before` from now on."""
        first, second = self._storage[before], self._storage[after]
        if first is second:
            return
        for node in self._values[second]:
            self._storage[node] = first
        for kept in (self._values, self._writes):
            kept.setdefault(first, []).extend(kept.pop(second, ()))


def _source(node: fx.Node) -> fx.Node | None:
    """The value in whose memory the one that `node` computes is, or may be."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    schema = getattr(node.target, "_schema", None)  # a getitem has none
    aliases = schema is None or any(each.alias_info is not None for each in schema.returns)
    row = operator_of(node)
    return node.args[0] if aliases or (row is not None and row.may_alias) else None
