"""Capture a model as torch.fx graphs that remember which module every operator ran in.

The best available of four views, each seeing less than the one before:

1. the whole model, by `torch.export` (non-strict) at ATen level: parameters are placeholders that
   map back to their names, every node carries its module stack, shapes are known;
2. where the whole cannot be exported (a detector's post-processing), the largest submodules that
   can, each with the inputs it received when the model really ran;
3. without example inputs, `torch.fx.symbolic_trace`: one node per torch module, no shapes;
4. the module tree alone.

All run under the flags of eval mode, whatever the model's own, unless asked otherwise; none changes
the model.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from normswap.graph.norm_modules import norm_kind
from normswap.graph.snapshot import untouched

How = Literal["export", "submodules", "symbolic_trace", "module tree"]


@dataclass(frozen=True)
class Region:
    """A captured part of the model.

    Attributes:
        path: the submodule captured, "" for the whole model.
        graph: its operators.
        tensors: the parameter or buffer, by its name in the whole model, behind each node that
            reads one.
        symbolic: nodes are modules (call_module) without shapes, instead of ATen operators.
        nested: modules that run in a graph inside this one (torch.no_grad, autocast, cond), where
            nothing is followed.
    """

    path: str
    graph: fx.Graph
    tensors: Mapping[fx.Node, str]
    symbolic: bool
    nested: frozenset[str] = frozenset()

    def stack(self, node: fx.Node) -> list[tuple[str, str]]:
        """The modules that `node` ran in, outermost first, as (call, path in the whole model).

        `call` differs between two calls of one module.
        """
        if self.symbolic:
            return [(node.name, str(node.target))] if node.op == "call_module" else [("", "")]
        stack = node.meta.get("nn_module_stack", {})
        return [(call, join(self.path, path)) for call, (path, _) in stack.items()]

    def module_path(self, node: fx.Node) -> str:
        """The innermost module that `node` ran in."""
        stack = self.stack(node)
        return stack[-1][1] if stack else self.path


@dataclass(frozen=True)
class Capture:
    """What could be seen of a model.

    Attributes:
        how: which of the four views this is.
        regions: the captured graphs; more than one only for "submodules".
        unseen: path -> reason, for every part that could not be captured.
        called_outside: modules that were also called where no graph shows it: from outside their
            region, or in a nested graph.
    """

    how: How
    regions: tuple[Region, ...]
    unseen: Mapping[str, str]
    called_outside: frozenset[str] = frozenset()


def capture(model: nn.Module, inputs: Any = None, *, training: bool = False) -> Capture:
    """Capture `model` as completely as possible; the model is not changed by being looked at.

    Args:
        inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs; without it
            nothing can be exported and shapes stay unknown.
        training: capture what runs in training mode, with every BatchNorm in eval mode: training
            with frozen statistics.

    Source: torch.export, non-strict mode; torch.fx.symbolic_trace (Reed et al., arXiv 2112.08429).
    """
    with untouched(model):
        for module in model.modules():
            # Not train() or eval(): a user's own may do more than set flags.
            module.training = training and norm_kind(module) != "batch"
        if inputs is None:
            return _symbolic(model)
        args, kwargs = as_call(inputs)
        try:
            region = _exported(model, "", args, kwargs)
            return Capture("export", (region,), {}, region.nested)
        except Exception as error:
            return _submodules(model, args, kwargs, first_line(error))


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`inputs` as the positional and keyword arguments of a call."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs, {}) if isinstance(inputs, tuple) else ((inputs,), {})


def join(path: str, name: str) -> str:
    """The dotted path of `name` below `path`; either may be empty."""
    return f"{path}.{name}" if path and name else path or name


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where there is none."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def _exported(model: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Region:
    program = torch.export.export(model.get_submodule(path), args, kwargs, strict=False)
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    tensors = {
        node: join(path, names[node.name])
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in names
    }
    nested = frozenset(
        join(path, inner)
        for name, graph in program.graph_module.named_modules()
        if name and isinstance(graph, fx.GraphModule)
        for node in graph.graph.nodes
        for inner, _ in node.meta.get("nn_module_stack", {}).values()
    )
    return Region(path, program.graph, tensors, symbolic=False, nested=nested)


class _LeafTracer(fx.Tracer):
    """torch.fx's tracer, with every normalization and torch module kept as one node."""

    def is_leaf_module(self, module: nn.Module, module_qualified_name: str) -> bool:
        return norm_kind(module) is not None or super().is_leaf_module(
            module, module_qualified_name
        )


def _symbolic(model: nn.Module) -> Capture:
    try:
        graph = _LeafTracer().trace(model)
    except Exception as error:
        return Capture("module tree", (), {"": first_line(error)})
    tensors = {node: str(node.target) for node in graph.nodes if node.op == "get_attr"}
    return Capture("symbolic_trace", (Region("", graph, tensors, symbolic=True),), {})


def _submodules(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str
) -> Capture:
    regions: list[Region] = []
    unseen = {"": reason}

    def descend(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for child, (child_args, child_kwargs) in _received(model, path, args, kwargs).items():
            if next(model.get_submodule(child).parameters(), None) is None:
                continue
            try:
                regions.append(_exported(model, child, child_args, child_kwargs))
            except Exception as error:
                unseen[child] = first_line(error)
                descend(child, child_args, child_kwargs)

    descend("", args, kwargs)
    calls = _count_calls(model, args, kwargs)
    return Capture("submodules", tuple(regions), unseen, _called_outside(model, regions, calls))


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    args, kwargs = _copied((args, kwargs))
    # A forward that fails half-way has still shown the inputs of what ran before.
    with torch.no_grad():
        try:
            model(*args, **kwargs)
        except Exception:
            return


def _copied(inputs: Any) -> Any:
    # An operation in place may change an input before it is used again.
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, inputs)


def _received(
    model: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """The inputs of the first call of each module that `path` itself calls, in order of execution.

    Not simply its children: one may be a container that is only indexed, and never called.
    """
    parent = model.get_submodule(path)
    received: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    running: list[str] = []

    def enter(child: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not running and child not in received:
                received[child] = _copied((args, kwargs))
            running.append(child)

        return hook

    def leave(*_: Any) -> None:
        running.pop()

    handles = []
    for name, module in parent.named_modules():
        if module is not parent:
            hook = enter(join(path, name))
            # First of all, because a hook of the user's may change what the module receives.
            handles.append(module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, always_call=True))
    _run(parent, args, kwargs)
    for handle in handles:
        handle.remove()
    return received


def _count_calls(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Counter[nn.Module]:
    calls: Counter[nn.Module] = Counter()

    def count(module: nn.Module, _: Any) -> None:
        calls[module] += 1

    handles = [module.register_forward_pre_hook(count) for module in model.modules()]
    _run(model, args, kwargs)
    for handle in handles:
        handle.remove()
    return calls


def _called_outside(
    model: nn.Module, regions: list[Region], calls: Counter[nn.Module]
) -> frozenset[str]:
    outside: set[str] = set()
    for region in regions:
        inside: dict[str, set[str]] = {}
        for node in region.graph.nodes:
            for call, path in region.stack(node):
                inside.setdefault(path, set()).add(call)
        times = calls[model.get_submodule(region.path)]
        outside |= region.nested
        outside |= {
            path
            for path, seen in inside.items()
            if calls[model.get_submodule(path)] > len(seen) * times and path != region.path
        }
    return frozenset(outside)
