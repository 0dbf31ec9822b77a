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
4. Where the result is to be trained, a forward that does something else in training (dropout as a
   function, noise, another batch norm that is not selected) is left, for its graph is fixed.
5. A call with `training=True`, as in a program that was exported in training mode, takes the
   statistics of the batch in eval mode as well. To freeze it is to let it use its running
   statistics from now on, and it can then be folded; a fold alone leaves it, because the function
   would be another. It is replaced like a BatchNorm with batch statistics.
6. Tensors that are computed in the forward, and normalizations of another kind, are left.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import fx, nn
from torch.fx.node import map_arg

from normswap.graph.capture import Capture, capture
from normswap.graph.functional import (
    argument,
    functional_kind,
    operator_name,
    running_statistics,
)
from normswap.graph.norm_modules import Unsupported
from normswap.graph.sites import Call, NormSite, find_sites
from normswap.passes.edits.calls import ROLES, OwnBatchNorm, result_of, tensors_of
from normswap.passes.forwards import Forwards
from normswap.passes.plan import Left, Pass, Plan
from normswap.passes.selection import Globs, select

OfBatch = Literal["no", "running", "all"]


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
        edits, unowned = own(model, seen, selected, inputs, trains=True)
        modules = [(site, "is a module already") for site in selected if site.owner == "module"]
        left = [Left(site=site.name, reason=why) for site, why in (*others, *modules, *unowned)]
        return Plan(passes=(str(self),), edits=tuple(edits), left=tuple(left))


def own(
    model: nn.Module,
    seen: Capture,
    sites: Sequence[NormSite],
    inputs: Any,
    *,
    trains: bool = False,
    of_batch: OfBatch = "no",
) -> tuple[list[OwnBatchNorm], list[tuple[NormSite, str]]]:
    """Plan a module for each functional site of `sites` that allows it; the others with a reason.

    Args:
        seen: a capture of `model` in eval mode with `inputs`.
        trains: the result has to compute in training what `model` does.
        of_batch: whether a call that takes the statistics of the batch in eval mode too
            (`training=True`) gets a module, which computes something else in eval mode: "running"
            for those with running statistics, which are to be frozen, "all" for those that are to
            be replaced.
    """
    functional = [site for site in sites if site.owner == "functional"]
    forwards = Forwards(model, seen, inputs)
    forwards.check(
        model.get_submodule(call.region.module_path(_norm(call)))
        for site in functional
        for call in site.executions
        if site.kind == "batch" and not call.region.symbolic
    )
    found: dict[str, list[OwnBatchNorm]] = {}
    left: dict[str, str] = {}
    for site in functional:
        try:
            found[site.name] = _edits(model, forwards, site, of_batch)
        except Unsupported as reason:
            left[site.name] = str(reason)
    if trains:
        left |= _other_in_training(model, forwards, found)
    edits: dict[tuple[str, str], OwnBatchNorm] = {}
    for edit in (edit for name, each in found.items() if name not in left for edit in each):
        # Of a forward that runs twice, both runs are this call.
        edits.setdefault((edit.path, edit.node), edit)
    reasons = [
        (site, f"is a functional call, and {left[site.name]}")
        for site in functional
        if site.name in left
    ]
    return list(edits.values()), reasons


def _edits(
    model: nn.Module, forwards: Forwards, site: NormSite, of_batch: OfBatch
) -> list[OwnBatchNorm]:
    if site.kind != "batch":
        raise Unsupported(f"is {site.kind} normalization, which has no running statistics")
    has_running = all(len(running_statistics(_norm(each))) == 2 for each in site.executions)
    if site.statistics != "running" and not has_running and of_batch != "all":
        raise Unsupported("has no running statistics, so it depends on the batch in eval mode too")
    if site.statistics != "running" and of_batch == "no":
        raise Unsupported(
            "depends on the batch in eval mode too, although it has running statistics; "
            "freeze makes it use those"
        )
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
                frozen=site.statistics == "running"
                and not _follows_training(forwards, module, call),
            )
        )
    return edits


def _norm(execution: Call) -> fx.Node:
    return next(node for node in execution.nodes if functional_kind(node) is not None)


def _follows_training(forwards: Forwards, module: nn.Module, call: fx.Node) -> bool:
    """Whether the batch norm `call` in the forward of `module` uses the batch in training mode."""
    if isinstance(module, fx.GraphModule):
        return False  # its graph is the same in both modes
    try:
        return bool(argument(forwards.in_training(module)[call], "training"))
    except Unsupported:  # as code that runs in training alone; most batch norms follow the flag
        return True


def _other_in_training(
    model: nn.Module, forwards: Forwards, found: Mapping[str, Sequence[OwnBatchNorm]]
) -> dict[str, str]:
    """The sites of `found` in whose forward something but they depends on the training flag."""
    edits = [edit for each in found.values() for edit in each]
    given = {(edit.path, edit.node) for edit in edits}
    left: dict[str, str] = {}
    for path in dict.fromkeys(edit.path for edit in edits):
        module = model.get_submodule(path)
        try:
            for node, twin in (twins := forwards.in_training(module)).items():
                roles = ("input", *ROLES, "momentum") if (path, node.name) in given else None
                if map_arg(_said(node, roles), twins.get) != _said(twin, roles):
                    raise Unsupported(
                        f"{type(module).__name__}.forward computes another {operator_name(node)} "
                        "in training, which a graph cannot; fold it for inference"
                    )
        except Unsupported as reason:
            left |= {edit.site: str(reason) for edit in edits if edit.path == path}
    return left


def _said(node: fx.Node, roles: Sequence[str] | None) -> Any:
    """What `node` is called with, or these arguments of it."""
    return (node.args, node.kwargs) if roles is None else [argument(node, r) for r in roles]


def owned_first(
    each: Pass,
    model: nn.Module,
    seen: Capture,
    sites: Sequence[NormSite],
    inputs: Any,
    of_batch: OfBatch = "no",
) -> tuple[Plan | None, list[Left]]:
    """Let the pass `each` act on functional sites, too, among the `sites` that it selected.

    Returns:
        The whole plan of `each` after these sites were given modules, None where no module can be
        given; and then why not, for each functional site.
    """
    edits, left = own(model, seen, sites, inputs, trains=True, of_batch=of_batch)
    if not edits:
        return None, [Left(site=site.name, reason=reason) for site, reason in left]
    # One that takes the statistics of the batch in eval mode is another function afterwards.
    of_the_batch = {site.name for site in sites if site.statistics == "batch"}
    exact = of_the_batch.isdisjoint(edit.site for edit in edits)
    first = Plan(edits=tuple(edits), exact=exact)
    return first + each.plan(first.apply(model), inputs), []
