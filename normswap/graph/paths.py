"""Every path through the forward of one module, where arguments, sizes or attributes decide.

A captured graph is of one example: what the forward decides by an argument (`return_features`), by
whether an argument is given, by a size, or by an attribute (`self.return_features`) is decided in
it. Here the forward is traced with nothing decided, with child modules as single calls, and at each
decision both answers are followed.

An argument may differ from call to call. An attribute hardly ever does: most of them say how a
model was built (`pre_norm`). Of those it is only asked whether another value of one leaves out a
normalization, or gives a value to one more child module or returns it.
"""

import ast
import copy
import inspect
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from itertools import product
from textwrap import dedent
from types import CodeType, MappingProxyType
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import fx, nn

from normswap.graph.alignment import is_number
from normswap.graph.norm_modules import norm_kind

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

    def to_bool(self, obj: object) -> bool:
        self.asked += 1
        if self.asked > _MOST_DECISIONS:
            raise _TooMany
        return self.answers[self.asked - 1] if self.asked <= len(self.answers) else True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if type(attr_val) in (nn.ModuleList, nn.ModuleDict):
            return _choosing(attr_val, self)
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Record a call; `self.layers[:2]` is no child, and its forward is followed."""
        if any(m is each for each in self.root.modules()):
            return super().call_module(m, forward, args, kwargs)
        return forward(*args, **kwargs)


class _Proxy(fx.Proxy):
    """A value, parts of which may be written: `x[:, 0] = y`."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


class _Open:
    """An attribute of which nothing is known; what compares or asks it is a decision."""

    def __init__(self, path: _Path) -> None:
        self._path = path

    def __bool__(self) -> bool:
        return self._path.to_bool(self)

    def _compare(self, other: object) -> bool:
        return self._path.to_bool(self)

    __eq__ = __lt__ = __le__ = __gt__ = __ge__ = _compare

    __hash__ = object.__hash__


def _choosing(container: nn.ModuleList | nn.ModuleDict, path: _Path) -> nn.Module:
    """The same list or dictionary; where an argument or an open attribute chooses, any member."""

    class Choosing(type(container)):  # type: ignore[misc]
        def __getitem__(self, key: Any) -> Any:
            if not isinstance(key, (fx.Proxy, _Open)):
                return super().__getitem__(key)
            *others, last = self.children()
            return next((each for each in others if path.to_bool(key)), last)

        def __contains__(self, key: Any) -> bool:
            if isinstance(key, (fx.Proxy, _Open)):
                return path.to_bool(key)
            return key in tuple(super().__iter__())

    chosen = copy.copy(container)
    chosen.__class__ = Choosing
    return chosen


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
    graphs = list(_graphs(module))
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
    for name in _deciding(module):
        for graph in _graphs(module, name):
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
    for name in _deciding(module):
        if len({_normalizing(module, graph) for graph in _graphs(module, name)}) > 1:
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
        self.seen: dict[Value, list[Beside]] = {}
        self.differing: set[Value] = set()
        self.in_all: dict[Value, set[Value]] = {}  # what is beside it in each call on each path

    def add(self, path: dict[Value, list[Beside]]) -> None:
        for value, beside in path.items():
            calls = [{each for each, _ in call} for call in beside]
            self.in_all[value] = set.intersection(self.in_all.get(value, calls[0]), *calls)
            if not _agree(value, self.seen.setdefault(value, beside), beside):
                self.differing.add(value)


def _agree(value: Value, first: list[Beside], second: list[Beside]) -> bool:
    """Whether two paths have the same beside `value` in each of its calls."""
    if value[0] != "call":
        return set(first) == set(second)
    # Other calls of the same function cannot be told from these where one path has more.
    return len(first) != len(second) or first == second


def _graphs(module: nn.Module, attribute: str = "") -> Iterator[fx.Graph]:
    """The paths that can be traced, with `attribute` left open as well."""
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
                with _open(module, attribute, path):
                    graph = path.trace(module, concrete_args=given or None)
            except Exception:  # this path raises, or cannot be traced
                graph = None
            asked = min(path.asked, _MOST_DECISIONS)
            for length in range(len(answers), asked):
                waiting.append((*answers, *[True] * (length - len(answers)), False))
            if graph is not None:
                yield graph


@contextmanager
def _open(module: nn.Module, attribute: str, path: _Path) -> Iterator[None]:
    if not attribute:
        yield
        return
    value = vars(module)[attribute]
    vars(module)[attribute] = _Open(path)
    try:
        yield
    finally:
        vars(module)[attribute] = value


def _deciding(module: nn.Module) -> list[str]:
    """The attributes that the forward of `module` reads and may decide by, from call to call.

    What the constructor decides by as well (`if use_bn: self.bn = ...`) says how it was built.
    """
    found, methods = dict[str, None](), ["forward"]
    for method in methods:  # which grows
        function = getattr(module, method)
        for name in _names(getattr(getattr(function, "__func__", function), "__code__", None)):
            if name != "training" and type(vars(module).get(name)) in (bool, int, str):
                found[name] = None
            own = inspect.isfunction(getattr(type(module), name, None))
            if own and not hasattr(nn.Module, name) and name not in methods:
                methods.append(name)
    built_by = _built_by(type(module))  # type: ignore[arg-type]  # a class is hashable
    return [name for name in found if name not in built_by]


@cache
def _built_by(cls: type) -> frozenset[str]:
    """The attributes that a constructor asks, or that hold an argument which it asks."""
    asked, held = set[str](), dict[str, str]()
    for each in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        try:
            code = ast.parse(dedent(inspect.getsource(vars(each)["__init__"])))
        except (KeyError, TypeError, OSError, SyntaxError):  # it has none, or none that can be read
            continue
        for node in ast.walk(code):
            if isinstance(node, (ast.If, ast.IfExp)):
                asked.update(filter(None, map(_named, ast.walk(node.test))))
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Name):
                held |= {target.attr: node.value.id for target in node.targets if _of_self(target)}
    return frozenset(asked | {name for name, argument in held.items() if argument in asked})


def _named(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    return node.attr if _of_self(node) else None


def _of_self(node: ast.AST) -> TypeGuard[ast.Attribute]:
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )


def _names(code: CodeType | None) -> Iterator[str]:
    if code is not None:
        yield from code.co_names
        for each in code.co_consts:
            yield from _names(each if isinstance(each, CodeType) else None)


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
