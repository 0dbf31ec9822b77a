"""Where a model normalizes: one `NormSite` for each normalization, module or functional.

Modules are found in the module tree, and what flows in and out of them in the captured graph;
functional calls (a bare `F.batch_norm`) are found in the graph alone.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import Any, Literal

import torch
from torch import fx, nn

from normswap.core.errors import Unsupported
from normswap.graph.capture import Capture
from normswap.graph.functional_norms import (
    functional_kind,
    functional_norms,
    operator_name,
    returns_several,
    running_statistics,
    statistics_of_call,
)
from normswap.graph.fused_paths import taken_for_layer_norms
from normswap.graph.index import Region
from normswap.graph.norm_modules import (
    NormKind,
    Statistics,
    anatomy,
    formula,
    is_foreign,
    norm_kind,
    statistics,
)
from normswap.graph.operators.operator import sources_of
from normswap.graph.operators.pointwise import is_same
from normswap.graph.operators.rule import argument


@dataclass(frozen=True)
class Call:
    """One execution of a site in a captured graph.

    Attributes:
        region: the graph.
        nodes: everything that ran inside the site, its tail included.
        input: the value it normalizes; None where that is not a single value.
        output: the value it returns; None where nothing uses it or it is not a single one.
    """

    region: Region
    nodes: frozenset[fx.Node]
    input: fx.Node | None
    output: fx.Node | None

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of the input, channels at the site's axis; None without shapes."""
        value = self.input.meta.get("val") if self.input is not None else None
        return tuple(value.shape) if isinstance(value, torch.Tensor) else None


@dataclass(frozen=True)
class NormSite:
    """One normalization of a model.

    Attributes:
        name: its module path; for a functional call the path at which a module of its own can be
            (`normswap.graph.functional_norms.functional_norms`).
        kind: "batch", "group", "layer", "instance", "rms", "local_response", or another that its
            class declares.
        owner: "module", or "functional" where no module is this normalization.
        cls: the class of the module, or the operator.
        num_features: channels it normalizes; None for an uninitialised lazy module.
        channel_axis: 1 or -1.
        eps: added to the variance.
        affine: it has a gain or bias.
        statistics: in eval mode: "running", "batch" (no running ones kept), "frozen", or "sample".
        parameters: how many trainable numbers it holds.
        calls: how often one forward calls it, the most of several examples; None where not every
            call could be captured.
        input_shape: of the first call, (N, C, ...) or (N, ..., C); None where unknown.
        produced_by: the operators or modules whose output it normalizes.
        used_by: those that take its output.
        paths: every path of the module, where it is registered more than once.
        tail: children that it applies to the normalized value (timm's BatchNormAct2d).
        why_not: why its inside cannot be rewritten; None where it can.
        executions: the calls in the graph.
    """

    name: str
    kind: NormKind
    owner: Literal["module", "functional"]
    cls: str
    num_features: int | None
    channel_axis: int
    eps: float
    affine: bool
    statistics: Statistics
    parameters: int
    calls: int | None
    input_shape: tuple[int, ...] | None
    produced_by: tuple[str, ...]
    used_by: tuple[str, ...]
    paths: tuple[str, ...]
    tail: tuple[str, ...] = ()
    why_not: str | None = None
    executions: tuple[Call, ...] = field(default=(), repr=False, compare=False)

    @property
    def spatial(self) -> int | None:
        """Positions at which a sample shows a channel: H * W for (N, C, H, W), 1 for (N, C).

        The fewest of any call; None where a shape is unknown.
        """
        shapes = [call.shape for call in self.executions] or [self.input_shape]
        known = [shape for shape in shapes if shape is not None]
        if len(known) < len(shapes):
            return None
        axis = self.channel_axis
        return min(prod(shape[1:]) // shape[axis] for shape in known)

    @property
    def has_fixed_affine(self) -> bool:
        """Whether eval mode is one affine per channel, from statistics that it holds.

        An InstanceNorm that tracks running statistics is such a one, beside the BatchNorms.
        """
        return self.kind in ("batch", "instance") and self.statistics in ("running", "frozen")

    @property
    def depends_on_batch(self) -> bool:
        """Whether in training what it gives for a sample depends on the others."""
        return self.kind != "instance" and self.statistics in ("running", "batch")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(_without_graph(self))


def _without_graph(site: NormSite) -> NormSite:
    # Not dataclasses.replace, so that asdict never sees (and deep-copies) a graph.
    return NormSite(**{**vars(site), "executions": ()})


def find_sites(seen: Capture) -> tuple[NormSite, ...]:
    """Every normalization of a model, in order of execution, then those that were never called."""
    index = seen.index
    mistaken = set(taken_for_layer_norms(seen.model))
    sites: list[NormSite] = []
    inside: set[fx.Node] = set()
    for module, paths in index.paths.items():
        if norm_kind(module) is None or (paths[0] == "" and _is_a_call(seen)):
            continue
        calls = [_call(run.region, run.nodes) for run in index.runs.get(module, ())]
        inside.update(node for call in calls for node in call.nodes)
        site = _module_site(module, paths, calls, seen)
        sites.append(replace(site, why_not=_MISTAKEN) if module in mistaken else site)
    sites += _functional_sites(seen, inside)

    def first_execution(site: NormSite) -> int:
        nodes = [node for call in site.executions for node in call.nodes]
        never = len(index.position_of)
        return min((index.position_of[node] for node in nodes), default=never)

    return tuple(sorted(sites, key=first_execution))


_MISTAKEN = (
    "is taken for a LayerNorm by the fused path of its TransformerEncoderLayer, so that the model "
    "computes one function with gradients and another without"
)


def _is_a_call(seen: Capture) -> bool:
    """Whether the whole model is one functional normalization, to which a module can be given."""
    called = (functional_kind(node) is not None for node in seen.index.region_of)
    return is_foreign(seen.model) and any(called)


def _call(region: Region, ran: Iterable[fx.Node]) -> Call:
    nodes = dict.fromkeys(ran)
    if not region.symbolic:
        for node in _handed_on(nodes):
            del nodes[node]
    inputs = {
        source
        for node in nodes
        for source in sources_of(node)
        if source not in nodes and source not in region.tensors
    }
    outputs = {node for node in nodes if any(user not in nodes for user in node.users)}
    return Call(
        region,
        frozenset(nodes),
        inputs.pop() if len(inputs) == 1 else None,
        outputs.pop() if len(outputs) == 1 else None,
    )


def _handed_on(nodes: Collection[fx.Node]) -> set[fx.Node]:
    """What ran in a call and is its input itself, which others take as well.

    A cast to the dtype that a tensor has returns that tensor, and whoever takes it later, as a
    residual sum does, takes what the cast returned in the captured graph.
    """
    itself: list[fx.Node] = []
    for node in nodes:
        read = sources_of(node)
        if is_same(node) and all(each in itself or each not in nodes for each in read):
            itself.append(node)
    found: set[fx.Node] = set()
    for node in reversed(itself):
        if any(user not in nodes or user in found for user in node.users):
            found.add(node)
    return found


def _functional_call(region: Region, node: fx.Node) -> Call:
    items = node.users if returns_several(node) else {}
    call = _call(region, {node, *items})
    return Call(region, call.nodes, argument(node, "input"), call.output)


def _module_site(module: nn.Module, paths: tuple[str, ...], calls: Any, seen: Capture) -> NormSite:
    kind = norm_kind(module)
    assert kind is not None
    found = formula(module)
    axis = 1 if found is None else found.channel_axis
    tail: tuple[str, ...] = ()
    why_not: str | None = None
    try:
        body = anatomy(module)
        axis, tail = body.channel_axis, body.tail
    except Unsupported as reason:
        why_not = str(reason)
    known = _is_seen(paths, seen)
    shape = calls[0].shape if calls else None
    if axis == -1 and all(call.shape is not None and len(call.shape) == 2 for call in calls):
        axis = 1 if kind == "batch" and calls else axis  # of (N, C) it is both
    return NormSite(
        name=paths[0],
        kind=kind,
        owner="module",
        cls=type(module).__name__,
        num_features=_num_features(module) or (shape[axis] if shape else None),
        channel_axis=axis,
        eps=0.0 if found is None else found.eps,
        affine=found is not None and (found.gain or found.bias) is not None,
        statistics=statistics(module, kind),
        parameters=sum(
            p.numel() for p in module.parameters(recurse=False) if not nn.parameter.is_lazy(p)
        ),
        calls=_most_calls(calls) if known else None,
        input_shape=shape,
        produced_by=_names(_producer(call) for call in calls),
        used_by=_names(name for call in calls for name in _users(call)),
        paths=paths,
        tail=tail,
        why_not=why_not,
        executions=tuple(calls),
    )


def _most_calls(calls: Sequence[Call]) -> int:
    """The most calls that one example makes."""
    return max(Counter(call.region.example for call in calls).values(), default=0)


def _is_seen(paths: tuple[str, ...], seen: Capture) -> bool:
    return seen.called_outside.keys().isdisjoint(paths) and any(
        region.path == "" or path == region.path or path.startswith(region.path + ".")
        for region in seen.regions
        for path in paths
    )


def _num_features(module: nn.Module) -> int | None:
    for name in ("num_features", "num_channels"):
        count = getattr(module, name, None)
        if count is not None:
            return int(count) or None
    shape = getattr(module, "normalized_shape", None)
    if shape is not None:
        return int(prod(shape))
    found = formula(module)
    names = () if found is None else (found.gain, found.bias, found.variance, found.mean)
    held = (getattr(module, name) for name in names if name is not None)
    return next((int(tensor.numel()) for tensor in held), None)


def _functional_sites(seen: Capture, inside: set[fx.Node]) -> Iterator[NormSite]:
    for name, found in functional_norms(seen, inside).items():
        calls = [_functional_call(region, node) for region, node in found]
        region, node = found[0]
        kind = functional_kind(node)
        assert kind is not None
        running = running_statistics(node) if kind in ("batch", "instance") else set()
        tensors = region.tensors.keys() & set(node.all_input_nodes)
        shape = calls[0].shape
        axis = -1 if kind in ("layer", "rms") else 1
        yield NormSite(
            name=name,
            kind=kind,
            owner="functional",
            cls=operator_name(node),
            num_features=shape[axis] if shape else None,
            channel_axis=axis,
            eps=float(argument(node, "eps") or 0.0) if kind != "local_response" else 0.0,
            affine=bool(tensors - running),
            statistics=statistics_of_call(node) if kind == "batch" else "sample",
            parameters=0,
            calls=_most_calls(calls),
            input_shape=shape,
            produced_by=_names(_producer(call) for call in calls),
            used_by=_names(name for call in calls for name in _users(call)),
            paths=(),
            why_not="a functional call that no module owns",
            executions=tuple(calls),
        )


def _names(values: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in values if name))


def _producer(call: Call) -> str:
    return describe(call.input, call.region) if call.input is not None else ""


def _users(call: Call) -> list[str]:
    if call.output is None:
        return []
    return [describe(user, call.region) for user in call.output.users if user not in call.nodes]


def describe(node: fx.Node, region: Region) -> str:
    """A node as a person would name it: "layer1.0.conv1", "add in layer1.0", "input x"."""
    if node.op == "placeholder":
        return f"input {node.target}"
    if node.op == "output":
        return "output"
    where = region.module_path(node)
    if node.op == "call_module":
        return where
    return f"{where} ({operator_name(node)})" if where else operator_name(node)
