"""Give normalizations that are called as functions a module, so that the other passes can act.

A bare `F.batch_norm(x, self.mean, self.var)` in a forward, and every BatchNorm of a program that
torch.export made, is code instead of a module. This pass is the first half of folding, freezing or
replacing one (pytorch issues 122070 and 141116).

Rules:
1. A functional batch norm with running statistics becomes a BatchNorm with the very same tensors,
   called in its place. In an exported program it takes the place of the bare module that holds
   them, so that no state-dict key changes.
2. The forward that holds the call becomes a fixed graph. The graph of a GraphModule is one already.
   Any other is traced in eval mode, and left if what is traced, put in its place and captured with
   the inputs, is not the same.
3. A call that uses its running statistics in training too becomes a frozen BatchNorm.
4. Tensors that are computed in the forward, and normalizations of another kind, are left.
"""

from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from normswap.graph.capture import Capture, capture
from normswap.graph.functional import argument, functional_kind, operator_name
from normswap.graph.norm_modules import Unsupported
from normswap.graph.sites import Call, NormSite, find_sites
from normswap.passes.edits.calls import OwnBatchNorm, result_of, tensors_of
from normswap.passes.edits.forward import forward_graph
from normswap.passes.forwards import Forwards
from normswap.passes.plan import Left, Pass, Plan
from normswap.passes.selection import Globs, select


class Own:
    """Give the selected functional batch norms a module; see the module's docstring."""

    def __init__(self, *, include: Globs | None = None, exclude: Globs = ()) -> None:
        self.include, self.exclude = include, exclude

    def __str__(self) -> str:
        return "Own"

    def plan(self, model: nn.Module, inputs: Any = None) -> Plan:
        """An edit for each call that can be given a module; the site keeps its name.

        Raises:
            NormswapError: no site is selected.
        """
        seen = capture(model, inputs)
        selected, others = select(find_sites(model, seen), self.include, self.exclude)
        edits, unowned = own(model, seen, selected, inputs)
        modules = [(site, "is a module already") for site in selected if site.owner == "module"]
        left = [Left(site=site.name, reason=why) for site, why in (*others, *modules, *unowned)]
        return Plan(passes=(str(self),), edits=tuple(edits), left=tuple(left))


def own(
    model: nn.Module, seen: Capture, sites: Sequence[NormSite], inputs: Any
) -> tuple[list[OwnBatchNorm], list[tuple[NormSite, str]]]:
    """Plan a module for each functional site of `sites` that allows it; the others with a reason.

    Args:
        seen: a capture of `model` in eval mode with `inputs`.
    """
    functional = [site for site in sites if site.owner == "functional"]
    forwards = Forwards(model, seen, inputs)
    forwards.check(
        model.get_submodule(call.region.module_path(_norm(call)))
        for site in functional
        for call in site.executions
        if site.kind == "batch" and not call.region.symbolic
    )
    edits: dict[tuple[str, str], OwnBatchNorm] = {}
    left: list[tuple[NormSite, str]] = []
    for site in functional:
        try:
            for edit in _edits(model, forwards, site):
                # Of a forward that runs twice, both runs are this call.
                edits.setdefault((edit.path, edit.node), edit)
        except Unsupported as reason:
            left.append((site, f"is a functional call, and {reason}"))
    return list(edits.values()), left


def _edits(model: nn.Module, forwards: Forwards, site: NormSite) -> list[OwnBatchNorm]:
    if site.kind != "batch":
        raise Unsupported(f"is {site.kind} normalization, which has no running statistics")
    if site.statistics != "running":
        raise Unsupported("has no running statistics, so it depends on the batch in eval mode too")
    edits = []
    for execution in site.executions:
        norm = _norm(execution)
        where = execution.region.module_path(norm)
        path, call = forwards.call(execution.region, norm)
        module = model.get_submodule(path)
        assert site.num_features is not None  # what a forward was found for has shapes
        tensors_of(module, call), result_of(call)  # they raise what stands against it
        edits.append(
            OwnBatchNorm(
                site=site.name,
                path=path,
                reason=f"is a call in {path or 'the model'}, whose forward is a graph from now on",
                node=call.name,
                child=site.name.removeprefix(f"{where}."),
                num_features=site.num_features,
                eps=site.eps,
                momentum=argument(call, "momentum"),
                frozen=not _follows_training(module, call),
            )
        )
    return edits


def _norm(execution: Call) -> fx.Node:
    return next(node for node in execution.nodes if functional_kind(node) is not None)


def _follows_training(module: nn.Module, call: fx.Node) -> bool:
    """Whether the batch norm `call` in the forward of `module` uses the batch in training mode."""
    if isinstance(module, fx.GraphModule):
        return False  # its graph is the same in both modes
    try:
        training = forward_graph(module, training=True)
    except Unsupported:  # as code that runs in training alone; most batch norms follow the flag
        return True
    both = [
        [node for node in graph.nodes if operator_name(node) == operator_name(call)]
        for graph in (call.graph, training)
    ]
    if len(both[0]) != len(both[1]):
        return True
    return bool(argument(both[1][both[0].index(call)], "training"))


def owned_first(
    each: Pass, model: nn.Module, seen: Capture, sites: Sequence[NormSite], inputs: Any
) -> tuple[Plan | None, list[Left]]:
    """Let the pass `each` act on functional sites, too, among the `sites` that it selected.

    Returns:
        The whole plan of `each` after these sites were given modules, None where no module can be
        given; and then why not, for each functional site.
    """
    edits, left = own(model, seen, sites, inputs)
    if not edits:
        return None, [Left(site=site.name, reason=reason) for site, reason in left]
    first = Plan(edits=tuple(edits))
    return first + each.plan(first.apply(model), inputs), []
