"""Which values of a captured graph share memory, and which operators write into it."""

from collections.abc import Set

from torch import fx

from normswap.core.errors import Unsupported
from normswap.graph.capture import Region
from normswap.graph.operators import operator_of
from normswap.graph.operators.rule import mutates


class Memory:
    """The memory that the values of one graph are in.

    Attributes:
        order: the position of each node.
        storage: of each value, the one whose memory it is in.
        values: of each of those, all the values in it.
        writes: of each, the operators that write into it.
    """

    def __init__(self, region: Region) -> None:
        self.order = {node: position for position, node in enumerate(region.graph.nodes)}
        self.storage: dict[fx.Node, fx.Node] = {}
        for node in self.order:
            source = _source(node)
            self.storage[node] = node if source is None else self.storage[source]
        self.values: dict[fx.Node, list[fx.Node]] = {}
        self.writes: dict[fx.Node, list[fx.Node]] = {}
        for node, storage in self.storage.items():
            self.values.setdefault(storage, []).append(node)
            target = mutates(node)
            if target is not None:
                self.writes.setdefault(self.storage[target], []).append(node)


class Writes(Memory):
    """What is written into which memory, in one graph.

    Attributes:
        written: the values whose memory is written into.
    """

    def __init__(self, region: Region) -> None:
        super().__init__(region)
        self.written = frozenset(self.writes)

    def check(self, value: fx.Node, nodes: Set[fx.Node]) -> None:
        """Check that `nodes`, which compute from `value`, see the same and show no one else theirs.

        Raises:
            Unsupported: something is written into it between them, or by one of them.
        """
        storage = self.storage[value]
        shared = set(self.values[storage]) - nodes
        positions = [self.order[node] for node in nodes]
        for node in self.writes.get(storage, ()):
            if node in nodes:
                users = {user for each in shared for user in each.users}
                if storage.op == "placeholder" or not users <= nodes | shared:
                    raise Unsupported("it is written into its input, which others see")
            elif min(positions) < self.order[node] < max(positions):
                raise Unsupported("its input is overwritten between the branches")


def storage_of(node: fx.Node) -> fx.Node:
    """The value whose memory `node` is in."""
    while (source := _source(node)) is not None:
        node = source
    return node


def _source(node: fx.Node) -> fx.Node | None:
    """The value in whose memory the one that `node` computes is, or may be."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    schema = getattr(node.target, "_schema", None)  # a getitem has none
    aliases = schema is None or any(each.alias_info is not None for each in schema.returns)
    row = operator_of(node)
    return node.args[0] if aliases or (row is not None and row.may_alias) else None
