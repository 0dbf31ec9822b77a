"""The forward of a module as a torch.fx graph: read it, change it, give it back.

Most rewrites replace modules. Some need the code that calls them: a bare `F.batch_norm` in a
forward, or the operators of a GraphModule. `forward_graph` reads that code as a graph, with every
child module one node, and `set_forward` lets the module compute a changed one. The module stays the
object it was; an instance gets a class of its own, below which its old one is.

Source: Reed et al. 2021, torch.fx (arXiv 2112.08429).
"""

import copy
import inspect
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from types import ModuleType, new_class
from typing import Any

import torch
from torch import fx, nn

from normswap.errors import first_line
from normswap.graph.norm_modules import Unsupported
from normswap.graph.snapshot import untouched
from normswap.passes.edits.parametrized import parametrized_tensors


def forward_graph(module: nn.Module, *, training: bool = False) -> fx.Graph:
    """The forward of `module` as a graph of its own, in which calls of its children are nodes.

    Of a GraphModule it is a copy of its graph, with the same names. Of any other module it is a
    symbolic trace: that of eval mode, so flags such as `self.training` are constants in it. Called
    again on an equal module it is the same graph, names included.

    Args:
        training: trace the forward of training mode instead.

    Raises:
        Unsupported: the forward depends on values, on whether an argument is given, sets
            attributes, or makes constants: a graph cannot say that.
    """
    changed = _changed.get()
    if changed is not None and module in changed and not training:
        return changed[module]
    if isinstance(module, fx.GraphModule):
        return copy.deepcopy(module.graph)
    name = type(module).__name__
    if "forward" in vars(module):
        raise Unsupported(f"the forward of {name} was replaced on the instance")
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.kind != parameter.POSITIONAL_OR_KEYWORD or parameter.default is not (
            parameter.empty
        ):  # a trace would answer "is it given?" once for all
            raise Unsupported(f"{name}.forward has an optional argument, {parameter.name}")
    with untouched(module):
        for each in module.modules():
            each.training = training
            _hide_parametrizations(each)
        before = _attributes(module)
        try:
            graph = _ChildrenAreLeaves().trace(module)
        except Exception as error:
            raise Unsupported(f"{name}.forward cannot be traced: {first_line(error)}") from error
        # torch.fx sets what is computed without the inputs as an attribute, too.
        if _attributes(module) != before:
            raise Unsupported(f"{name}.forward sets attributes or makes constants")
    return graph


class _ChildrenAreLeaves(fx.Tracer):
    proxy_buffer_attributes = True  # else what is computed from a buffer becomes a constant

    def is_leaf_module(self, module: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _WritesInPlace(node, self)


class _WritesInPlace(fx.Proxy):
    """`x += y` stays what it is; torch.fx records x + y, and others who hold x would see no sum."""


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def write(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return write


for _name in fx.graph.inplace_methods.keys() - {"setitem"}:
    setattr(_WritesInPlace, f"__{_name}__", _in_place(getattr(operator, _name)))


def _hide_parametrizations(module: nn.Module) -> None:
    """Let the code that reads a parametrized tensor say so, not what computes it at present."""
    names = parametrized_tensors(module)
    if names:
        module.__class__ = type(module).__bases__[0]
    for name in names:
        module._parameters[name] = nn.Parameter(torch.empty(0))


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What the attributes of `module` are and hold, by identity."""
    return {name: (id(value), _items(value)) for name, value in vars(module).items()}


def _items(value: Any) -> list[tuple[Any, int]]:
    if isinstance(value, dict):  # torch's registries as well
        return [(key, id(item)) for key, item in value.items()]
    return [(None, id(item)) for item in value] if isinstance(value, list) else []


def set_forward(module: nn.Module, graph: fx.Graph) -> None:
    """Let `module`, in place, compute `graph` from now on: one of `forward_graph`, changed.

    Its class is a new subclass of the one it had, or of that below an earlier rewrite. All else is
    as before: identity, methods, attributes, hooks, parameters; it can be copied, pickled, exported
    and rewritten again. Its forward is the graph's in training mode also, which for a symbolic
    trace is that of eval mode; flags of its children still count. Of a GraphModule the graph is
    replaced, and the old one is not changed.
    """
    changed = _changed.get()
    if changed is not None:
        changed[module] = graph
    else:
        _write(module, graph)


_changed: ContextVar[dict[nn.Module, fx.Graph] | None] = ContextVar("changed", default=None)


@contextmanager
def rewriting_at_the_end() -> Iterator[None]:
    """Inside, `set_forward` only notes the graph: many changes of one forward are written once.

    Copying the graph of a program and generating its code takes as long as it has operators, and
    its BatchNorms are changed one after the other. If the body raises, nothing is written.
    """
    changed: dict[nn.Module, fx.Graph] = {}
    token = _changed.set(changed)
    try:
        yield
    finally:
        _changed.reset(token)
    for module, graph in changed.items():
        _write(module, graph)


def _write(module: nn.Module, graph: fx.Graph) -> None:
    with below_parametrizations(module):
        cls: Any = type(module)
        if isinstance(module, fx.GraphModule):
            # Assigning a graph writes the forward into the class: the old class keeps its own, so
            # that a snapshot of the module can be restored.
            own: Any = new_class("GraphModuleImpl", cls.__bases__)
            for name in ("__name__", "__qualname__", "__module__"):
                setattr(own, name, getattr(cls, name))
            module.__class__ = own
            module.graph = graph
        else:
            code = graph.python_code("self")
            original = cls.original if issubclass(cls, RewrittenForward) else cls
            module.__class__ = _rewritten_class(original, code.src, code.globals)


class RewrittenForward:
    """Mixed into the class of one module, whose forward is generated code.

    Attributes:
        original: the class without it.
        source: the code.
        names: what the code refers to.
    """

    original: type[nn.Module]
    source: str
    names: dict[str, Any]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so pickle and deepcopy are told how to make it again;
        # Python modules (torch) can only be referred to by name.
        modules = {n: v.__name__ for n, v in self.names.items() if isinstance(v, ModuleType)}
        others = {n: v for n, v in self.names.items() if n not in modules}
        state = super().__reduce_ex__(protocol)[2:]
        return _rewritten_instance, (self.original, self.source, modules, others), *state


def _rewritten_class(
    original: type[nn.Module], source: str, names: dict[str, Any]
) -> type[nn.Module]:
    scope = dict(names)
    exec(source, scope)  # what torch.fx generated from a graph
    body = {
        "forward": scope["forward"],
        "original": original,
        "source": source,
        "names": names,
        "__module__": original.__module__,
        "__doc__": original.__doc__,
    }
    return type(original.__name__, (RewrittenForward, original), body)


def _rewritten_instance(
    original: type[nn.Module], source: str, modules: dict[str, str], others: dict[str, Any]
) -> nn.Module:
    names = {name: import_module(module) for name, module in modules.items()} | others
    return object.__new__(_rewritten_class(original, source, names))


@contextmanager
def below_parametrizations(module: nn.Module) -> Iterator[None]:
    """Inside, the class of `module` is the one below what torch's parametrizations put on top."""
    cls = type(module)
    if not parametrized_tensors(module):
        yield
        return
    module.__class__ = cls.__bases__[0]
    yield
    module.__class__ = type(cls.__name__, (type(module),), dict(vars(cls)))
