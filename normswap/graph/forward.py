"""The forward of a module, read as a torch.fx graph in which every child module is one node.

A captured graph is flat and of one input; this is the code itself, for every input. What is changed
in it, `normswap.passes.edits.traced_forward` gives back to the module.

Source: Reed et al. 2021, torch.fx (arXiv 2112.08429).
"""

import copy
import inspect
import operator
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import fx, nn

from normswap.core.errors import Unsupported, first_line
from normswap.graph.alignment import align
from normswap.graph.exporting import tracing
from normswap.graph.forward_paths import ChildrenAreLeaves
from normswap.graph.index import Index, Region
from normswap.graph.parametrized import parametrized_tensors
from normswap.graph.snapshot import contents_kept, untouched
from normswap.graph.supported import python_modules
from normswap.graph.undecided import deciding_attribute

# The graphs that modules will compute, where many changes are written at once.
CHANGED: ContextVar[dict[nn.Module, fx.Graph] | None] = ContextVar("changed", default=None)


def forward_graph(module: nn.Module, *, training: bool = False) -> fx.Graph:
    """The forward of `module` as a graph of its own, in which calls of its children are nodes.

    Of a GraphModule it is a copy of its graph, with the same names. Of any other module it is a
    symbolic trace: that of eval mode, so flags such as `self.training` are constants in it. Called
    again on an equal module it is the same graph, names included.

    Args:
        training: trace the forward of training mode instead.

    Raises:
        Unsupported: the forward depends on values, on whether an argument is given, decides by an
            attribute what normalizes, sets attributes, or makes constants: a graph cannot say that.
    """
    changed = CHANGED.get()
    if changed is not None and module in changed and not training:
        return changed[module]
    if isinstance(module, fx.GraphModule):
        if type(module).train is not nn.Module.train:  # torchvision's feature extractors
            raise Unsupported(f"{type(module).__name__} has another graph in training mode")
        return copy.deepcopy(module.graph)
    name = type(module).__name__
    if "forward" in vars(module):
        raise Unsupported(f"the forward of {name} was replaced on the instance")
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.kind != parameter.POSITIONAL_OR_KEYWORD or parameter.default is not (
            parameter.empty
        ):  # a trace would answer "is it given?" once for all
            raise Unsupported(f"{name}.forward has an optional argument, {parameter.name}")
    with untouched(module, training=training):
        if (decides := deciding_attribute(module)) is not None:
            raise Unsupported(f"{name}.forward decides by its attribute {decides} what normalizes")
    with tracing(), untouched(module, training=training), contents_kept(module):
        for each in python_modules(module):
            _hide_parametrizations(each)
        before = _attributes(module)
        try:
            graph = _Forward().trace(module)
        except Exception as error:
            raise Unsupported(f"{name}.forward cannot be traced: {first_line(error)}") from error
        # torch.fx sets what is computed without the inputs as an attribute, too.
        if _attributes(module) != before:
            raise Unsupported(f"{name}.forward sets attributes or makes constants")
    return graph


def forward_of(index: Index, module: nn.Module) -> fx.Graph:
    """`forward_graph` of a module of a captured model, traced once.

    Raises:
        Unsupported: as `forward_graph`.
    """
    if module not in index.traces:
        try:
            index.traces[module] = forward_graph(module)
        except Unsupported as reason:
            index.traces[module] = reason
    found = index.traces[module]
    if isinstance(found, Unsupported):
        raise found
    return found


def aligned(index: Index, region: Region, call: str, path: str) -> dict[fx.Node, fx.Node]:
    """The node of the forward of the module at `path` for each operator that its `call` ran.

    Raises:
        Unsupported: as `forward_graph` and `normswap.graph.alignment.align`.
    """
    key = region.graph, call
    if key not in index.alignments:
        try:
            traced = forward_of(index, index.modules[path])
            index.alignments[key] = align(index, region, call, traced, path)
        except Unsupported as reason:
            index.alignments[key] = reason
    found = index.alignments[key]
    if isinstance(found, Unsupported):
        raise found
    return found


class _Forward(ChildrenAreLeaves):
    proxy_buffer_attributes = True  # else what is computed from a buffer becomes a constant

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
