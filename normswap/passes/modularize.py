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
6. A layer, RMS, group or instance norm becomes torch's module of it where its kind is asked for:
   replaced, centered, its gain folded.
7. Tensors and shapes that are computed in the forward are left.

`modularize_convs` does the same for convolutions, so that their branches can be merged. In a
program that torch.export made every convolution is a call, and its weight lies in a bare module.
One that is a branch of a sum gets a module there, with the very same tensors.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from normswap.core.errors import Unsupported
from normswap.graph.branches.linear import Linear
from normswap.graph.branches.sums import BranchSum
from normswap.graph.capture import Capture, capture
from normswap.graph.functional_norms import functional_kind, operator_name, running_statistics
from normswap.graph.index import Index, Region, join
from normswap.graph.operators import is_a
from normswap.graph.operators.rule import argument, shape_of
from normswap.graph.sites import Call, NormSite, find_sites
from normswap.passes.edits import Edit
from normswap.passes.edits.functional import (
    ROLES,
    ModularizeConv,
    ModularizeNorm,
    conv_of,
    result_of,
    roles_of,
    tensors_of,
)
from normswap.passes.edits.traced_forward import ForwardEdit
from normswap.passes.forwards import Forwards
from normswap.passes.plan import Pass, Plan, Skipped
from normswap.passes.selection import Globs, select

OfBatch = Literal["no", "running", "all"]


class Modularize:
    """Give the selected functional normalizations a module; see the module's docstring."""

    def __init__(self, *, include: Globs | None = None, exclude: Globs = ()) -> None:
        self.include, self.exclude = include, exclude

    def __str__(self) -> str:
        return "Modularize"

    def plan(self, model: nn.Module, inputs: Any = None) -> Plan:
        """An edit for each call that can be given a module; the site keeps its name.

        Raises:
            NormswapError: no site is selected.
        """
        seen = capture(model, inputs)
        selected, others = select(find_sites(seen), self.include, self.exclude)
        edits, as_calls = modularize(seen, selected, inputs, trains=True, other_kinds=True)
        modules = [(site, "is a module already") for site in selected if site.owner == "module"]
        left = [Skipped(site=site.name, reason=why) for site, why in (*others, *modules, *as_calls)]
        return Plan(passes=(str(self),), edits=tuple(edits), left=tuple(left))


def modularize(
    seen: Capture,
    sites: Sequence[NormSite],
    inputs: Any,
    *,
    trains: bool = False,
    of_batch: OfBatch = "no",
    other_kinds: bool = False,
) -> tuple[list[ModularizeNorm], list[tuple[NormSite, str]]]:
    """Plan a module for each functional site of `sites` that allows it; the others with a reason.

    Args:
        seen: a capture of a model in eval mode with `inputs`.
        trains: the result has to compute in training what the model does.
        of_batch: whether a call that takes the statistics of the batch in eval mode too
            (`training=True`) gets a module, which computes something else in eval mode: "running"
            for those with running statistics, which are to be frozen, "all" for those that are to
            be replaced.
        other_kinds: whether normalizations that are no BatchNorm get modules, too.
    """
    functional = [site for site in sites if site.owner == "functional"]
    forwards = Forwards(seen, inputs)
    forwards.check(
        seen.index.module_of(_norm(call))
        for site in functional
        for call in site.executions
        if (other_kinds or site.kind == "batch") and not call.region.symbolic
    )
    found: dict[str, list[ModularizeNorm]] = {}
    left: dict[str, str] = {}
    for site in functional:
        try:
            if site.kind != "batch" and not other_kinds:
                raise Unsupported(f"is {site.kind} normalization, which has no running statistics")
            found[site.name] = _edits(seen.model, forwards, site, of_batch)
        except Unsupported as reason:
            left[site.name] = str(reason)
    if trains:
        left |= _other_in_training(seen.model, forwards, found)
    edits: dict[tuple[str, str], ModularizeNorm] = {}
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
) -> list[ModularizeNorm]:
    """The edits for a site of a kind that is asked for.

    Raises:
        Unsupported: it can have no module.
    """
    if site.kind == "batch":
        _check_statistics(site, of_batch)
    elif site.kind not in ("layer", "rms", "group", "instance"):
        raise Unsupported(f"is {site.kind} normalization, of which torch's module takes no tensors")
    edits = []
    for execution in site.executions:
        norm = _norm(execution)
        if site.kind == "instance" and running_statistics(norm):
            raise Unsupported("has running statistics, which are not given to a module")
        path, call = forwards.call(execution.region, norm)
        module = model.get_submodule(path)
        tensors = tensors_of(module, call, roles_of(site.kind))
        if site.kind == "batch":
            settings = _of_batch_norm(forwards, site, module, call)
        else:
            settings = _of_another(site.kind, call, norm, tensors)
        edits.append(
            ModularizeNorm(
                site=site.name,
                path=path,
                reason=f"is a call in {path or 'the model'}, whose forward is a graph from now on",
                node=call.name,
                child=site.name.removeprefix(f"{execution.region.module_path(norm)}."),
                kind=site.kind,  # type: ignore[arg-type]
                rank=len(shape_of(argument(norm, "input"))),
                **settings,
            )
        )
    return edits


def _check_statistics(site: NormSite, of_batch: OfBatch) -> None:
    has_running = all(len(running_statistics(_norm(each))) == 2 for each in site.executions)
    if site.statistics != "running" and not has_running and of_batch != "all":
        raise Unsupported("has no running statistics, so it depends on the batch in eval mode too")
    if site.statistics != "running" and of_batch == "no":
        raise Unsupported(
            "depends on the batch in eval mode too, although it has running statistics; "
            "freeze makes it use those"
        )


def _of_batch_norm(
    forwards: Forwards, site: NormSite, module: nn.Module, call: fx.Node
) -> dict[str, Any]:
    """What the module is made with for `call`, a batch norm in the forward of `module`."""
    result_of(call)  # it raises what stands against it
    fixed = site.statistics == "running" and not _follows_training(forwards, module, call)
    momentum = argument(call, "momentum")
    return {
        "sizes": (site.num_features,),
        "eps": site.eps,
        "momentum": momentum,
        "frozen": fixed,
    }


def _of_another(
    kind: str, call: fx.Node, norm: fx.Node, tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """What the module is made with for `call`, a normalization that was captured as `norm`."""
    if tensors.keys() == {"bias"}:
        raise Unsupported("has a bias without a gain, which no module of torch's has")
    sizes = shape_of(argument(norm, "input"))[1:2]
    if kind in ("layer", "rms"):
        sizes = tuple(argument(norm, "normalized_shape"))
        if not tensors and not _is_written_out(argument(call, "normalized_shape")):
            raise Unsupported("computes its normalized_shape in forward")
    if not all(isinstance(size, int) for size in sizes):
        raise Unsupported("computes its normalized_shape in forward")
    groups = argument(norm, "num_groups") if kind == "group" else 1
    return {"sizes": sizes, "eps": argument(norm, "eps"), "groups": groups}


def _is_written_out(shape: Any) -> bool:
    return isinstance(shape, (tuple, list, torch.Size)) and all(isinstance(n, int) for n in shape)


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
    model: nn.Module, forwards: Forwards, found: Mapping[str, Sequence[ModularizeNorm]]
) -> dict[str, str]:
    """The sites of `found` in whose forward something but they depends on the training flag."""
    edits = [edit for each in found.values() for edit in each]
    given = {(edit.path, edit.node) for edit in edits if edit.kind == "batch"}
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


def modularized_first(
    each: Pass,
    seen: Capture,
    sites: Sequence[NormSite],
    inputs: Any,
    of_batch: OfBatch = "no",
    other_kinds: bool = False,
) -> tuple[Plan | None, list[Skipped]]:
    """Let the pass `each` act on functional sites, too, among the `sites` that it selected.

    Returns:
        The whole plan of `each` after these sites were given modules, None where no module can be
        given; and then why not, for each functional site.
    """
    edits, left = modularize(
        seen, sites, inputs, trains=True, of_batch=of_batch, other_kinds=other_kinds
    )
    if not edits:
        return None, [Skipped(site=site.name, reason=reason) for site, reason in left]
    # One that takes the statistics of the batch in eval mode is another function afterwards.
    of_the_batch = {site.name for site in sites if site.statistics == "batch"}
    exact = of_the_batch.isdisjoint(edit.site for edit in edits)
    first = Plan(edits=tuple(edits), exact=exact)
    then = each.plan(first.apply(seen.model), inputs)
    return Plan(edits=tuple(_of_use(edits, then.edits)), exact=exact) + then, []


def _of_use(edits: Sequence[ModularizeNorm], then: Sequence[Edit]) -> list[ModularizeNorm]:
    """Those of `edits` but for the modules of other kinds with which `then` does nothing."""
    changed = {edit.site for edit in then}
    rewritten = {edit.path for edit in then if isinstance(edit, ForwardEdit)}
    return [
        edit
        for edit in edits
        if edit.kind == "batch" or edit.site in changed or edit.path in rewritten
    ]


def modularize_convs(seen: Capture, inputs: Any, sums: Sequence[BranchSum]) -> list[ModularizeConv]:
    """An edit for each weight of a convolution that is a branch of a sum.

    Args:
        seen: a capture of a model in eval mode with `inputs`.
        sums: those in it.
    """
    forwards = Forwards(seen, inputs)
    edits: dict[str, ModularizeConv] = {}
    for found in sums:
        for leaf in found.value.leaves():
            if _is_called(seen.index, leaf):
                try:
                    edit = _edit(seen.model, forwards, found.region, leaf.node)
                except Unsupported:  # the sum is left, for the reason that it is a call
                    continue
                edits.setdefault(edit.site, edit)
    return list(edits.values())


def _is_called(index: Index, leaf: Linear) -> bool:
    """Whether it is a convolution in the graph of a GraphModule."""
    where = index.module_of(leaf.node)
    return is_a(leaf.node, "convolution") and isinstance(where, fx.GraphModule)


def _edit(model: nn.Module, forwards: Forwards, region: Region, node: fx.Node) -> ModularizeConv:
    path, call = forwards.call(region, node)
    module, weight = model.get_submodule(path), argument(call, "weight")
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        raise Unsupported("computes its weight in forward")
    holder = str(weight.target).rpartition(".")[0]
    reads = [n for n in call.graph.find_nodes(op="get_attr") if _is_in(holder, str(n.target))]
    calls = sorted({user for read in reads for user in read.users})
    if any(each.target is not call.target for each in calls):
        raise Unsupported("its weight is used elsewhere too")
    conv_of(module, calls, holder)  # it raises what stands against it
    return ModularizeConv(
        site=join(path, holder),
        path=path,
        reason="is a branch of a sum",
        nodes=tuple(each.name for each in calls),
        holder=holder,
    )


def _is_in(holder: str, target: str) -> bool:
    return target.rpartition(".")[0] == holder
