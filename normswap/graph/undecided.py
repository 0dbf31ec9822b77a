"""What differs from one path through a forward to another.

An argument may differ from call to call. An attribute hardly ever does: most of them say how a
model was built (`pre_norm`). Of those it is only asked whether another value of one leaves out a
normalization, or gives a value to one more child module or returns it.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import fx, nn

from normswap.graph.alignment import is_number
from normswap.graph.forward_paths import attributes_asked, traced_paths
from normswap.graph.norm_modules import norm_kind

# What computes a value: ("call_module", the child's name), ("placeholder", the argument's), or
# ("call", the name of a function or method).
Value = tuple[str, str]
Alternative = frozenset[tuple[Value, int]]  # who takes what one call returns, or what it takes


class Undecided(NamedTuple):
    """What differs from one path through a forward to another.

    Attributes:
        values: what is not given to the same takers on every path.
        takers: what does not take the same values on every path on which it is called, and those
            that it takes in each of its calls all the same.
        calls: the names of all functions and methods that are called on some path.
    """

    values: frozenset[Value] = frozenset()
    takers: Mapping[Value, frozenset[Value]] = MappingProxyType({})
    calls: frozenset[str] = frozenset()

    def may_be(self, differing: Iterable[Value], operator: str) -> bool:
        """Whether an operator of a captured graph may be of a call among these.

        A call that torch has no operator for (`x[1:]`, `F.normalize`) is captured as others.
        """
        if named(operator) in self.calls:
            return is_call(differing, operator)
        return any(what == "call" and not hasattr(torch.ops.aten, it) for what, it in differing)


def is_call(values: Iterable[Value], operator: str) -> bool:
    """Whether a call of `operator` is among these."""
    return ("call", named(operator)) in values


def undecided(module: nn.Module) -> Undecided | None:
    """What the forward of `module` decides by its arguments, their sizes or its attributes.

    None where no path can be traced: a forward that a trace cannot follow may hide more. The caller
    keeps the model `untouched`.
    """
    if type(module).__module__.startswith("torch.nn.") or isinstance(module, fx.GraphModule):
        return Undecided()  # a container or a layer of torch's own, or one path by construction
    graphs = list(traced_paths(module))
    if not graphs:
        return None
    values, takers = _Paths(), _Paths()
    for graph in graphs:
        of_values, of_takers = _takers_and_taken(module, graph)
        values.add(of_values)
        takers.add(of_takers)
    always = {taker: frozenset(takers.in_all[taker]) for taker in takers.differing}
    usual = [_reached_and_reaching(module, graph) for graph in graphs]
    normalizing = frozenset.intersection(*(_normalizing(module, graph) for graph in graphs))
    for name in attributes_asked(module):
        for graph in traced_paths(module, name):
            left_out = normalizing - _normalizing(module, graph)
            reached, reaching = _reached_and_reaching(module, graph)
            for value, there in reached.items():
                known = [each[0][value] for each in usual if value in each[0]]
                more = any(each < there for each in known)
                if known and there not in known and (more or left_out):
                    values.differing.add(value)
            for taker, there in reaching.items():
                known = [each[1][taker] for each in usual if taker in each[1]]
                if known and left_out and not any(each & there for each in known):
                    always[taker] = frozenset()
    calls = frozenset(
        _value(module, node, 0)[1]
        for graph in graphs
        for node in graph.nodes
        if node.op in ("call_function", "call_method")
    )
    return Undecided(frozenset(values.differing), always, calls)


def deciding_attribute(module: nn.Module) -> str | None:
    """An attribute of `module` by which its forward decides what normalizes."""
    for name in attributes_asked(module):
        if len({_normalizing(module, graph) for graph in traced_paths(module, name)}) > 1:
            return name
    return None


def _normalizing(module: nn.Module, graph: fx.Graph) -> frozenset[str]:
    """The child modules that normalize, or have a child that does."""
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    return frozenset(
        name for name in called if any(map(norm_kind, module.get_submodule(name).modules()))
    )


class _Paths:
    """What is beside each value on the paths so far, and where two of them do not agree."""

    def __init__(self) -> None:
        self.seen: dict[Value, list[Alternative]] = {}
        self.differing: set[Value] = set()
        self.in_all: dict[Value, set[Value]] = {}  # what is beside it in each call on each path

    def add(self, path: dict[Value, list[Alternative]]) -> None:
        for value, beside in path.items():
            calls = [{each for each, _ in call} for call in beside]
            self.in_all[value] = set.intersection(self.in_all.get(value, calls[0]), *calls)
            if not _agree(value, self.seen.setdefault(value, beside), beside):
                self.differing.add(value)


def _agree(value: Value, first: list[Alternative], second: list[Alternative]) -> bool:
    """Whether two paths have the same beside `value` in each of its calls."""
    if value[0] != "call":
        return set(first) == set(second)
    # Other calls of the same function cannot be told from these where one path has more.
    return len(first) != len(second) or first == second


def _takers_and_taken(
    module: nn.Module, graph: fx.Graph
) -> tuple[dict[Value, list[Alternative]], dict[Value, list[Alternative]]]:
    """For each value on the path, call after call, who takes it; for each taker what it takes."""
    takers: dict[Value, list[Alternative]] = {}
    taken: dict[Value, list[Alternative]] = {}
    numbers: set[fx.Node] = set()
    for node in graph.nodes:
        if is_number(node, numbers):
            numbers.add(node)
            continue
        if node.op in ("output", "get_attr"):
            continue
        # An optional argument, which is a placeholder with a default, may be absent.
        if node.op != "placeholder" or not node.args:
            users = [user for user in _using(module, node) if not is_number(user, numbers)]
            beside = Counter(_value(module, user, 0) for user in users)
            takers.setdefault(_value(module, node, -1), []).append(frozenset(beside.items()))
        if node.op != "placeholder":
            sources = {_computed(module, each) for each in node.all_input_nodes} - numbers
            beside = Counter(_value(module, source, -1) for source in sources)
            taken.setdefault(_value(module, node, 0), []).append(frozenset(beside.items()))
    return takers, taken


Reach = dict[Value, frozenset[Value]]


def _reached_and_reaching(module: nn.Module, graph: fx.Graph) -> tuple[Reach, Reach]:
    """What each value comes to, and what comes to each taker, where only layers with weights count.

    Calls of a function cannot be told from each other: one that is called twice is left out.
    """
    reached: Reach = {}
    reaching: Reach = {}
    numbers: set[fx.Node] = set()
    calls: Counter[Value] = Counter()
    for node in graph.nodes:
        if is_number(node, numbers):
            numbers.add(node)
        calls[_value(module, node, 0)] += 1
    for node in graph.nodes:
        value, taker = _value(module, node, -1), _value(module, node, 0)
        once = calls[taker] == 1 or node.op not in ("call_function", "call_method")
        if node in numbers or node.op in ("output", "get_attr") or not once:
            continue
        there = _beyond(module, node, lambda each: each.users, 0, numbers)
        reached[value] = reached.get(value, frozenset()) | there
        there = _beyond(module, node, lambda each: each.all_input_nodes, -1, numbers)
        if there:
            reaching[taker] = reaching.get(taker, frozenset()) | there
    return reached, reaching


def _beyond(
    module: nn.Module,
    node: fx.Node,
    step: Callable[[fx.Node], Iterable[fx.Node]],
    member: int,
    numbers: set[fx.Node],
) -> frozenset[Value]:
    """The layers, arguments and results that are next to `node` on one side."""
    found, waiting, seen = set[Value](), [node], {node, *numbers}
    while waiting:
        for each in [each for each in step(waiting.pop()) if each not in seen]:
            seen.add(each)
            if each.op in ("placeholder", "output") or _has_weights(module, each):
                found.add(_value(module, each, member))
            else:
                waiting.append(each)
    return frozenset(found)


def _has_weights(module: nn.Module, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    child = module.get_submodule(str(node.target))
    return any(True for _ in (*child.parameters(), *child.buffers()))


def _computed(module: nn.Module, node: fx.Node) -> fx.Node:
    """What computes `node`: a captured graph holds no call of an Identity."""
    while _calls_identity(module, node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _using(module: nn.Module, node: fx.Node) -> Iterator[fx.Node]:
    """What takes `node`, itself or from an Identity."""
    for user in node.users:
        if _calls_identity(module, user):
            yield from _using(module, user)
        else:
            yield user


def _calls_identity(module: nn.Module, node: fx.Node) -> bool:
    return node.op == "call_module" and _is_identity(module.get_submodule(str(node.target)))


def _is_identity(module: nn.Module) -> bool:
    return type(module) is nn.Identity


def _value(module: nn.Module, node: fx.Node, member: int) -> Value:
    """What `node` is.

    Args:
        member: 0 of what takes a value, -1 of what returns one.
    """
    if node.op == "call_module":
        return "call_module", end_of(module, str(node.target), member)
    if node.op in ("call_function", "call_method"):
        return "call", named(getattr(node.target, "__name__", str(node.target)))
    return node.op, str(node.target)


def end_of(module: nn.Module, path: str, member: int) -> str:
    """The path of the layer that counts of a Sequential: a forward may go through its members.

    Args:
        member: 0 for the first, which takes what is given to it, -1 for the last, which returns.
    """
    while type(child := module.get_submodule(path)) is nn.Sequential and len(child):
        computing = [key for key, each in child.named_children() if not _is_identity(each)]
        path = f"{path}.{(computing or list(child._modules))[member]}"
    return path


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
