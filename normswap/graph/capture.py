"""Capture a model as torch.fx graphs that remember which module every operator ran in.

The best available of four views, each seeing less than the one before:

1. the whole model, by `torch.export` (non-strict) at ATen level: parameters are placeholders that
   map back to their names, every node carries its module stack, shapes are known;
2. where the whole cannot be exported (a detector's post-processing), the largest submodules that
   can, each with the inputs it received when the model really ran;
3. without example inputs, `torch.fx.symbolic_trace`: one node per torch module, no shapes;
4. the module tree alone.

All run under the flags of eval mode, whatever the model's own, unless asked otherwise; none changes
the model. While it is looked at, it is in eval mode, and attributes of its modules may be others: a
forward of the same model in another thread has to wait until the look is over. The operators of a
GraphModule run in that module, whatever they were exported from.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import fx, nn

from normswap.core.ambient import alone
from normswap.core.calls import running_on
from normswap.core.errors import NormswapError, Unsupported, first_line
from normswap.core.interrupts import at_last
from normswap.core.modes import set_modes
from normswap.graph.exporting import exported, taken_out_modes, tracing
from normswap.graph.fused_paths import leave_fused_path
from normswap.graph.index import Index, Region, join
from normswap.graph.norm_modules import has_fixed_affine, norm_kind
from normswap.graph.operators.registration import load_registered
from normswap.graph.running import Observed, as_call, received
from normswap.graph.snapshot import contents_kept, untouched
from normswap.graph.supported import SCRIPTED, python_modules

How = Literal["export", "submodules", "symbolic_trace", "module tree"]
_VIEWS = get_args(How)


@dataclass(frozen=True)
class Capture:
    """What could be seen of a model.

    Attributes:
        model: the model.
        how: which of the four views this is.
        regions: the captured graphs; more than one for "submodules", and for several examples.
        unseen: path -> reason, for every part that could not be captured.
        called_outside: modules that were also called, or their tensors read, where no graph shows
            it (from outside their region, or in a nested graph), each with the reason.
        examples: how many examples the model was captured with.
    """

    model: nn.Module = field(repr=False)
    how: How
    regions: tuple[Region, ...]
    unseen: Mapping[str, str]
    called_outside: Mapping[str, str] = field(default_factory=dict)
    examples: int = 1

    @cached_property
    def index(self) -> Index:
        """What ran where, who owns which tensor, and who reads it."""
        return Index(self.model, self.regions)

    def check_calls(self, path: str, name: str | None = None) -> None:
        """Check that every call of the module at `path` is in a graph.

        Args:
            name: what the message calls the module; its path where it is not given.

        Raises:
            Unsupported: one is not.
        """
        if path in self.called_outside:
            where = (
                f"is called where its dataflow could not be captured: {self.called_outside[path]}"
            )
            raise Unsupported(f"{path if name is None else name} {where}".lstrip())

    def why_unseen(self, path: str) -> str:
        """Why what calls the module at `path` could not be captured: the nearest reason known."""
        while path not in self.unseen and path:
            path = path.rpartition(".")[0]
        return self.unseen.get(path, "nothing that was captured calls it")


def capture(
    model: nn.Module, inputs: Any = None, *, training: bool = False, anew: bool = False
) -> Capture:
    """Capture `model` as completely as possible; the model is not changed by being looked at.

    Args:
        inputs: a tensor, a tuple of positional inputs, a dict of keyword inputs, or a list of
            several such examples, each of which gives its own graph; without it nothing can be
            exported and shapes stay unknown.
        training: capture what runs in training mode, with every BatchNorm in eval mode: training
            with frozen statistics. What is checkpointed (torch.utils.checkpoint) is seen as well.
        anew: do not take what `captures_kept` keeps, nor keep it.

    Raises:
        NormswapError: nothing can be captured because the model rejects `inputs`.

    Source: torch.export, non-strict mode; torch.fx.symbolic_trace (Reed et al., arXiv 2112.08429).
    """
    kept = _KEPT.get()
    if kept is None or anew:
        return _captured(model, inputs, training)
    key = training, inputs is None
    if key not in kept or kept[key][0] is not model or kept[key][1] is not inputs:
        kept[key] = model, inputs, _captured(model, inputs, training)
    return kept[key][2]


# By training and whether there are inputs: the model, the inputs, and the last capture of them.
_KEPT: ContextVar[dict[tuple[bool, bool], tuple[nn.Module, Any, Capture]] | None] = ContextVar(
    "kept", default=None
)


@contextmanager
def captures_kept() -> Iterator[None]:
    """Capture a model only once with the same inputs, until `forget_captures` of it."""
    before = _KEPT.get()
    with at_last(lambda: _KEPT.set(before)):
        if before is None:
            _KEPT.set({})
        yield


def forget_captures(model: nn.Module) -> None:
    """Note that `model` changes, so that what was captured of it does not hold any more."""
    kept = _KEPT.get() or {}
    for key in [key for key, (held, _, _) in kept.items() if held is model]:
        del kept[key]


def _captured(model: nn.Module, inputs: Any, training: bool) -> Capture:
    examples = examples_of(inputs)
    if len(examples) < 2:
        return _capture(model, examples[0] if examples else None, training)
    return _together([_capture(model, each, training) for each in examples])


def _together(seen: list[Capture]) -> Capture:
    """One capture of what several examples show: what holds must hold in all of their graphs."""
    worst = max((each.how for each in seen), key=_VIEWS.index)
    return Capture(
        seen[0].model,
        worst,
        tuple(
            replace(region, example=index)
            for index, each in enumerate(seen)
            for region in each.regions
        ),
        {path: why for each in seen for path, why in each.unseen.items()},
        {path: why for each in seen for path, why in each.called_outside.items()},
        len(seen),
    )


def _capture(model: nn.Module, inputs: Any, training: bool) -> Capture:
    with alone(), untouched(model, training=training):
        for module in python_modules(model):
            fixed = norm_kind(module) == "batch" or has_fixed_affine(module)
            module.training = training and not fixed
            if isinstance(module, fx.GraphModule):
                _as_any_other(module)
            leave_fused_path(module)
        seen = _best_view(model, inputs, training=training)
    for region in seen.regions:
        load_registered(region.graph)
    scripted = {
        path: SCRIPTED
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, torch.jit.ScriptModule)
    }
    return replace(seen, called_outside={**seen.called_outside, **scripted})


def _best_view(model: nn.Module, inputs: Any, *, training: bool) -> Capture:
    if inputs is None:
        return _symbolic(model)
    args, kwargs = as_call(inputs)
    try:
        region = _exported(model, "", args, kwargs, training=training)
        return Capture(model, "export", (region,), region.nested, region.nested)
    except Exception as error:
        seen = _submodules(model, args, kwargs, first_line(error), training=training)
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
        with contents_kept(model), torch.no_grad():
            model(*args, **kwargs)
        return
    except Exception as error:
        failure = error
    set_modes((module, True) for module in model.modules())
    try:
        with contents_kept(model), torch.no_grad():
            model(*args, **kwargs)
    except Exception:
        with running_on(args or kwargs, "give inputs it takes"):
            raise failure from None
    raise NormswapError(
        f"the model runs in training mode only ({first_line(failure)}); it is looked at in eval "
        "mode, so give it a forward for that"
    ) from failure


def examples_of(inputs: Any) -> list[Any]:
    """The examples in `inputs`: those of a list, or the one that it is, or none for None.

    Raises:
        NormswapError: it is an empty list.
    """
    if isinstance(inputs, list):
        if not inputs:
            raise NormswapError("the list of example inputs is empty; give at least one example")
        return inputs
    return [] if inputs is None else [inputs]


def _exported(
    model: nn.Module,
    path: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    training: bool,
) -> Region:
    program = exported(model.get_submodule(path), args, kwargs, training=training)
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    tensors = {
        node: join(path, names[node.name])
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in names
    }
    nested = {
        join(path, inner): f"it runs in {operator}"
        for operator, graph in _nested_graphs(program.graph_module)
        for node in graph.nodes
        for inner, _ in node.meta.get("nn_module_stack", {}).values()
    }
    lifted = signature.inputs_to_lifted_tensor_constants
    constants = {
        node: program.constants[lifted[node.name]]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in lifted
    }
    indices = {node: each for node, each in constants.items() if not each.is_floating_point()}
    modes = taken_out_modes(program.graph)
    return Region(
        path, program.graph, tensors, False, nested, indices, constants=constants, modes=modes
    )


def _nested_graphs(module: fx.GraphModule) -> Iterator[tuple[str, fx.Graph]]:
    """The graphs inside the graph of `module`, each with the operator that runs it."""
    for node in module.graph.nodes:
        for each in node.all_input_nodes:
            inner = getattr(module, str(each.target), None) if each.op == "get_attr" else None
            if isinstance(inner, fx.GraphModule):
                name = str(getattr(node.target, "__name__", node.target))
                no_grad = name == "wrap_with_set_grad_enabled" and node.args[0] is False
                yield "torch.no_grad" if no_grad else f"torch's operator {name}", inner.graph
                yield from _nested_graphs(inner)


class _LeafTracer(fx.Tracer):
    """torch.fx's tracer, with every normalization and torch module kept as one node."""

    def is_leaf_module(self, module: nn.Module, module_qualified_name: str) -> bool:
        leaf = norm_kind(module) is not None or isinstance(module, torch.jit.ScriptModule)
        return leaf or super().is_leaf_module(module, module_qualified_name)


def _symbolic(model: nn.Module) -> Capture:
    try:
        with tracing(), contents_kept(model):  # what needs no input really runs
            graph = _LeafTracer().trace(model)
    except Exception as error:
        return Capture(model, "module tree", (), {"": first_line(error)})
    tensors = {node: str(node.target) for node in graph.nodes if node.op == "get_attr"}
    return Capture(model, "symbolic_trace", (Region("", graph, tensors, symbolic=True),), {})


def _submodules(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    reason: str,
    *,
    training: bool,
) -> Capture:
    regions: list[Region] = []
    unseen = {"": reason}

    def descend(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for child, (child_args, child_kwargs) in received(model, path, args, kwargs).items():
            if next(model.get_submodule(child).parameters(), None) is None:
                continue
            try:
                region = _exported(model, child, child_args, child_kwargs, training=training)
                regions.append(region)
            except Exception as error:
                unseen[child] = first_line(error)
                descend(child, child_args, child_kwargs)

    descend("", args, kwargs)
    outside = _called_outside(model, regions, reason, args, kwargs)
    return Capture(model, "submodules", tuple(regions), unseen, outside)


def _called_outside(
    model: nn.Module,
    regions: list[Region],
    reason: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[str, str]:
    roots = [model.get_submodule(region.path) for region in regions]
    observed = Observed(model, roots, args, kwargs)
    outside = {
        path: reason
        for path, module in model.named_modules(remove_duplicate=False)
        if module in observed.read
    }
    for region, root in zip(regions, roots, strict=True):
        inside: dict[str, set[str]] = {}
        for call, nodes in region.ran.items():
            path = next(path for each, path in region.stack(nodes[0]) if each == call)
            inside.setdefault(path, set()).add(call)
        outside |= region.nested
        if any(way != observed.ways[root][0] for way in observed.ways.get(root, ())):
            # Another call may run other operators than the one captured.
            outside |= dict.fromkeys(inside, f"{region.path} is called in several ways")
        outside |= {
            path: reason
            for path, seen in inside.items()
            if observed.calls[model.get_submodule(path)] != len(seen) * observed.calls[root]
            and path != region.path
        }
    return outside
