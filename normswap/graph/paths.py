"""Every path through the forward of one module, where arguments or sizes decide what runs.

A captured graph is of one example: what the forward decides by an argument (`return_features`), by
whether an argument is given, or by a size is decided in it. Here the forward is traced with nothing
decided, with child modules as single calls, and at each decision both answers are followed.
"""

import inspect
from collections import Counter
from collections.abc import Iterator
from itertools import product

from torch import fx, nn

from normswap.graph.snapshot import untouched

_MOST_PATHS = 32
_MOST_DECISIONS = 10  # on one path; a loop that asks a tensor goes on forever
# Who takes a value: for each call of a child ("call_module", its name), or of a function or method,
# how often it takes it.
Takers = Counter[tuple[str, str]]
Value = tuple[str, str]  # the call that computes a value, or ("placeholder", the argument)


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


def undecided(module: nn.Module) -> frozenset[Value]:
    """The values in the forward of `module` that not every path gives to the same takers.

    Nothing where all paths agree, and where no path can be traced: a forward that a trace cannot
    follow may hide more.
    """
    if type(module).__module__.startswith("torch.nn.") or isinstance(module, fx.GraphModule):
        return frozenset()  # a container or a layer of torch's own, or one path by construction
    found: dict[Value, Takers] = {}
    differing: set[Value] = set()
    with untouched(module):
        for each in module.modules():
            each.training = False
        for graph in _graphs(module):
            for value, takers in _takers(graph).items():
                if found.setdefault(value, takers) != takers:
                    differing.add(value)
    return frozenset(differing)


def _graphs(module: nn.Module) -> Iterator[fx.Graph]:
    optional = [
        name
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.default is None
    ]
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


def _takers(graph: fx.Graph) -> dict[Value, Takers]:
    """For each call on the path, who takes what it returns; all calls of one child together."""
    found: dict[Value, Takers] = {}
    for node in graph.nodes:
        if (
            node.op != "output"
            and node.op != "get_attr"
            and not (
                node.op == "placeholder" and node.args  # an optional argument, which may be absent
            )
        ):
            takers = found.setdefault((node.op, str(node.target)), Counter())
            takers.update(_name(user) for user in node.users if not _only_looks(user))
    return found


def _name(node: fx.Node) -> tuple[str, str]:
    return ("output", "") if node.op == "output" else (node.op, str(node.target))


def _only_looks(node: fx.Node) -> bool:
    """Whether `node` asks for a size or a type, or is a decision about one."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel", "ndimension")
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "ndim", "dtype", "device")
    return False
