"""Every path through the forward of one module, where arguments, sizes or attributes decide.

A captured graph is of one example: what the forward decides by an argument (`return_features`), by
whether an argument is given, by a size, or by an attribute (`self.return_features`) is decided in
it. Here the forward is traced with nothing decided, with child modules as single calls, and at each
decision both answers are followed.
"""

import ast
import copy
import inspect
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from itertools import product
from textwrap import dedent
from types import CodeType
from typing import Any, TypeGuard

from torch import fx, nn

_MOST_PATHS = 32
_MOST_DECISIONS = 10  # on one path; a loop that asks a tensor goes on forever


def traced_paths(module: nn.Module, attribute: str = "") -> Iterator[fx.Graph]:
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


def attributes_asked(module: nn.Module) -> list[str]:
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


class _TooMany(Exception):
    """A path with more decisions than are followed."""


class ChildrenAreLeaves(fx.Tracer):
    """A tracer of one forward, in which every call of a child module is one node."""

    def is_leaf_module(self, module: nn.Module, module_qualified_name: str) -> bool:
        return True


class _Path(ChildrenAreLeaves):
    """A tracer that answers each decision as it is told, and notes where it was not told."""

    def __init__(self, answers: tuple[bool, ...]) -> None:
        super().__init__()
        self.answers, self.asked = answers, 0

    def to_bool(self, obj: object) -> bool:
        self.asked += 1
        if self.asked > _MOST_DECISIONS:
            raise _TooMany
        return self.answers[self.asked - 1] if self.asked <= len(self.answers) else True

    @cached_property
    def _held(self) -> frozenset[nn.Module]:
        return frozenset(self.root.modules())

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
        if m in self._held:
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
