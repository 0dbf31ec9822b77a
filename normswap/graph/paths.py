"""Every path through the forward of one module, where arguments or sizes decide what runs.

A captured graph is of one example: what the forward decides by an argument (`return_features`), by
whether an argument is given, or by a size is decided in it. Here the forward is traced with nothing
decided, with child modules as single calls, and at each decision both answers are followed.
"""

import inspect
from collections import Counter
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from torch import fx, nn

from normswap.graph.alignment import is_number

_MOST_PATHS = 32
_MOST_DECISIONS = 10  # on one path; a loop that asks a tensor goes on forever
# What computes a value: ("call_module", the child's name), ("placeholder", the argument's), or
# ("call", the name of a function or method).
Value = tuple[str, str]
Beside = frozenset[tuple[Value, int]]  # who takes what one call returns, or what it takes


class _TooMany(Exception):
    """A path with more decisions than are followed."""


class _Path(fx.Tracer):
    """A tracer that answers each decision as it is told, and notes where it was not told."""

    def __init__(self, answers: tuple[bool, ...]) -> None:
        super().__init__()
        self.answers, self.asked = answers, 0

    def is_leaf_module(self, module: nn.Module, module_qualified_name: str) -> bool:
        return True

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.asked += 1
        if self.asked > _MOST_DECISIONS:
            raise _TooMany
        return self.answers[self.asked - 1] if self.asked <= len(self.answers) else True


class Undecided(NamedTuple):
    """What differs from one path through a forward to another.

    Attributes:
        values: what is not given to the same takers on every path.
        takers: what does not take the same values on every path on which it is called.
    """

    values: frozenset[Value] = frozenset()
    takers: frozenset[Value] = frozenset()


def undecided(module: nn.Module) -> Undecided | None:
    """What the forward of `module` decides by its arguments or their sizes.

    None where no path can be traced: a forward that a trace cannot follow may hide more. The caller
    keeps the model `untouched`.
    """
    if type(module).__module__.startswith("torch.nn.") or isinstance(module, fx.GraphModule):
        return Undecided()  # a container or a layer of torch's own, or one path by construction
    values, takers = _Paths(), _Paths()
    for graph in _graphs(module):
        of_values, of_takers = _takers_and_taken(module, graph)
        values.add(of_values)
        takers.add(of_takers)
    return (
        Undecided(frozenset(values.differing), frozenset(takers.differing)) if values.seen else None
    )


class _Paths:
    """What is beside each value on the paths so far, and where two of them do not agree."""

    def __init__(self) -> None:
        self.seen: dict[Value, list[Beside]] = {}
        self.differing: set[Value] = set()

    def add(self, path: dict[Value, list[Beside]]) -> None:
        for value, beside in path.items():
            if not _agree(value, self.seen.setdefault(value, beside), beside):
                self.differing.add(value)


def _agree(value: Value, first: list[Beside], second: list[Beside]) -> bool:
    """Whether two paths have the same beside `value` in each of its calls."""
    if value[0] != "call":
        return set(first) == set(second)
    # Other calls of the same function cannot be told from these where one path has more.
    return len(first) != len(second) or first == second


def _graphs(module: nn.Module) -> Iterator[fx.Graph]:
    try:
        parameters = inspect.signature(module.forward).parameters
    except (ValueError, TypeError):  # a forward that is not Python (a scripted module)
        return
    optional = [name for name, each in parameters.items() if each.default is None]
    followed = 0
    # `mask is None` asks nothing of a proxy, so that being absent is a start of its own.
    for absent in product((False, True), repeat=min(len(optional), 3)):
        given = {name: None for name, left_out in zip(optional, absent, strict=False) if left_out}
        waiting: list[tuple[bool, ...]] = [()]
        while waiting and followed < _MOST_PATHS:
            answers = waiting.pop()
            path = _Path(answers)
            followed += 1
            try:
                graph = path.trace(module, concrete_args=given or None)
            except Exception:  # this path raises, or cannot be traced
                graph = None
            asked = min(path.asked, _MOST_DECISIONS)
            for length in range(len(answers), asked):
                waiting.append((*answers, *[True] * (length - len(answers)), False))
            if graph is not None:
                yield graph


def _takers_and_taken(
    module: nn.Module, graph: fx.Graph
) -> tuple[dict[Value, list[Beside]], dict[Value, list[Beside]]]:
    """For each value on the path, call after call, who takes it; for each taker what it takes."""
    takers: dict[Value, list[Beside]] = {}
    taken: dict[Value, list[Beside]] = {}
    numbers: set[fx.Node] = set()
    for node in graph.nodes:
        if is_number(node, numbers):
            numbers.add(node)
            continue
        if node.op in ("output", "get_attr"):
            continue
        # An optional argument, which is a placeholder with a default, may be absent.
        if node.op != "placeholder" or not node.args:
            users = [user for user in node.users if not is_number(user, numbers)]
            beside = Counter(_value(module, user, 0) for user in users)
            takers.setdefault(_value(module, node, -1), []).append(frozenset(beside.items()))
        if node.op != "placeholder":
            sources = [source for source in node.all_input_nodes if source not in numbers]
            beside = Counter(_value(module, source, -1) for source in sources)
            taken.setdefault(_value(module, node, 0), []).append(frozenset(beside.items()))
    return takers, taken


def _value(module: nn.Module, node: fx.Node, member: int) -> Value:
    """What `node` is.

    Args:
        member: of a Sequential, the one that counts: its first takes a value, its last returns one.
            A forward may call it as a whole, or go through its members.
    """
    if node.op == "call_module":
        name = str(node.target)
        while type(child := module.get_submodule(name)) is nn.Sequential and len(child):
            name = f"{name}.{list(child._modules)[member]}"
        return "call_module", name
    if node.op in ("call_function", "call_method"):
        return "call", named(getattr(node.target, "__name__", str(node.target)))
    return node.op, str(node.target)


def named(operator: str) -> str:
    """The name of an operator, in place or not: "add" for add, add_ and iadd."""
    return _OPERATORS.get(operator, operator.removesuffix("_"))


_OPERATORS = {
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "itruediv": "div",
    "truediv": "div",
    "imatmul": "matmul",
}
