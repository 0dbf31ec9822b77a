"""Capture a model as torch.fx graphs that remember which module every operator ran in.

The best available of four views, each seeing less than the one before:

1. the whole model, by `torch.export` (non-strict) at ATen level: parameters are placeholders that
   map back to their names, every node carries its module stack, shapes are known;
2. where the whole cannot be exported (a detector's post-processing), the largest submodules that
   can, each with the inputs it received when the model really ran;
3. without example inputs, `torch.fx.symbolic_trace`: one node per torch module, no shapes;
4. the module tree alone.

All run under the flags of eval mode, whatever the model's own, unless asked otherwise; none changes
the model. The operators of a GraphModule run in that module, whatever they were exported from.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from functools import cached_property
from io import StringIO
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from normswap.errors import NormswapError, first_line
from normswap.graph.norm_modules import has_fixed_affine, norm_kind
from normswap.graph.running import Observed, received
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
        indices: the tensors of integers that the code makes out of numbers (`x[:, [2, 0, 1]]`).
        nested: modules that run in a graph inside this one (torch.no_grad, autocast, cond), where
            nothing is followed.
    """

    path: str
    graph: fx.Graph
    tensors: Mapping[fx.Node, str]
    symbolic: bool
    nested: frozenset[str] = frozenset()
    indices: Mapping[fx.Node, Tensor] = field(default_factory=dict)

    def stack(self, node: fx.Node) -> list[tuple[str, str]]:
        """The modules that `node` ran in, outermost first, as (call, path in the whole model).

        `call` differs between two calls of one module.
        """
        if self.symbolic:
            return [(node.name, str(node.target))] if node.op == "call_module" else [("", "")]
        stack = node.meta.get("nn_module_stack", {})
        return [(call, join(self.path, path)) for call, (path, _) in stack.items()]

    @cached_property
    def ran(self) -> Mapping[str, list[fx.Node]]:
        """The nodes that ran in each call of a module, in order."""
        found: dict[str, list[fx.Node]] = {}
        for node in self.graph.nodes:
            for call in dict.fromkeys(call for call, _ in self.stack(node)):
                found.setdefault(call, []).append(node)
        return found

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
        called_outside: modules that were also called, or their tensors read, where no graph shows
            it: from outside their region, or in a nested graph.
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

    Raises:
        NormswapError: nothing can be captured because the model rejects `inputs`.

    Source: torch.export, non-strict mode; torch.fx.symbolic_trace (Reed et al., arXiv 2112.08429).
    """
    with untouched(model):
        for module in model.modules():
            # Not train() or eval(): a user's own may do more than set flags.
            fixed = norm_kind(module) == "batch" or has_fixed_affine(module)
            module.training = training and not fixed
            if isinstance(module, fx.GraphModule):
                _as_any_other(module)
        if inputs is None:
            return _symbolic(model)
        args, kwargs = as_call(inputs)
        try:
            region = _exported(model, "", args, kwargs)
            return Capture("export", (region,), {}, region.nested)
        except Exception as error:
            seen = _submodules(model, args, kwargs, first_line(error))
        if not seen.regions:
            _check_runs(model, args, kwargs)
        return seen


def _as_any_other(module: fx.GraphModule) -> None:
    """Let torch.export see `module` as a module like any other, until `untouched` undoes it.

    It would take the operators of a GraphModule for its caller's, or for those of the modules that
    it was once exported from, which it need not have any more.
    """
    cls = type(module)
    vars(module)["graph"] = module.graph  # a property of the class; hooks may ask for it
    module.__class__ = type(cls.__name__, (nn.Module,), {"forward": cls.forward})


def _check_runs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:
        raise NormswapError(
            f"the model does not run on the inputs given: {first_line(error)}; give inputs it takes"
        ) from error


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`inputs` as the positional and keyword arguments of a call."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs, {}) if isinstance(inputs, tuple) else ((inputs,), {})


def join(path: str, name: str) -> str:
    """The dotted path of `name` below `path`; either may be empty."""
    return f"{path}.{name}" if path and name else path or name


def _exported(model: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Region:
    # Where it fails on control flow, torch prints the graph so far before it raises; and it warns
    # of attributes set in forward, which `untouched` puts back.
    with redirect_stderr(StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _no_hook_left():
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
    lifted = signature.inputs_to_lifted_tensor_constants
    constants = {
        node: program.constants[lifted[node.name]]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in lifted
    }
    indices = {node: each for node, each in constants.items() if not each.is_floating_point()}
    return Region(path, program.graph, tensors, symbolic=False, nested=nested, indices=indices)


@contextmanager
def _no_hook_left() -> Iterator[None]:
    """Remove torch.export's hook on assigned buffers: torch 2.9 leaves it when an export fails.

    The model could then not assign a buffer any more, whoever runs it.
    """
    hooks = torch.nn.modules.module._global_buffer_registration_hooks
    before = set(hooks)
    try:
        yield
    finally:
        for hook in set(hooks) - before:
            del hooks[hook]


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
        for child, (child_args, child_kwargs) in received(model, path, args, kwargs).items():
            if next(model.get_submodule(child).parameters(), None) is None:
                continue
            try:
                regions.append(_exported(model, child, child_args, child_kwargs))
            except Exception as error:
                unseen[child] = first_line(error)
                descend(child, child_args, child_kwargs)

    descend("", args, kwargs)
    outside = _called_outside(model, regions, args, kwargs)
    return Capture("submodules", tuple(regions), unseen, outside)


def _called_outside(
    model: nn.Module, regions: list[Region], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> frozenset[str]:
    roots = [model.get_submodule(region.path) for region in regions]
    observed = Observed(model, roots, args, kwargs)
    outside = {
        path
        for path, module in model.named_modules(remove_duplicate=False)
        if module in observed.read
    }
    for region, root in zip(regions, roots, strict=True):
        inside: dict[str, set[str]] = {}
        for node in region.graph.nodes:
            for call, path in region.stack(node):
                inside.setdefault(path, set()).add(call)
        outside |= region.nested
        if any(way != observed.ways[root][0] for way in observed.ways.get(root, ())):
            outside |= inside.keys()  # another call may run other operators than the one captured
        outside |= {
            path
            for path, seen in inside.items()
            if observed.calls[model.get_submodule(path)] != len(seen) * observed.calls[root]
            and path != region.path
        }
    return frozenset(outside)
