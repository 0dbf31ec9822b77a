"""Give a BatchNorm its own copy of what computes its input, where that is cheaper than its affine.

A BatchNorm of a value that others use as well cannot go into what computes that value. A copy of
the producer can take it up, and costs little where that is an embedding or a convolution with one
weight per channel.

Rules:
1. What a BatchNorm normalizes, as it is or through operators that keep it (dropout in eval mode,
   contiguous), comes from one module: a convolution, a Linear or an embedding.
2. The copy takes at most as many multiply-adds in a forward as the scale and shift that go, one for
   each number: a convolution its kernel size times its input channels per group for each output, a
   Linear its input features, an embedding none. No ordinary convolution is copied for a value that
   others take as well. Where the BatchNorm alone takes the value of this call (one convolution that
   is called for every level of a pyramid, each with its own BatchNorm), the copy takes its place,
   and costs memory and no time.
3. Producer and BatchNorm are called in one forward, which a symbolic trace shows. It is rewritten:
   the BatchNorm's call takes the producer's input.
4. No forward is rewritten where several modules hold the producer, and one of them calls it for
   this BatchNorm alone: that one gets a copy, and what only moves elements may lie between (the
   shared layers of TabNet). Nor where every call of the producer is for such a BatchNorm and keeps
   the shape: the copies take the places of the BatchNorms, and the producer returns its input.
5. Nobody may see the difference: no hook is on what changes, and neither the value nor the input of
   the producer is written into between the two calls.

The parameters of the copy count as memory: an embedding's whole table is held twice. A forward that
was rewritten is that of eval mode, in training mode too. A producer that is a function call, a
constant, and one whose value is transposed before it is normalized are left.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx, nn

from normswap.core.errors import Unsupported
from normswap.graph.alignment import align
from normswap.graph.capture import Capture
from normswap.graph.index import Region, join
from normswap.graph.operators import is_a
from normswap.graph.operators.layout import along
from normswap.graph.operators.operator import MOVES, rule_of, sources_of
from normswap.graph.operators.rule import (
    ChannelIndex,
    argument,
    has_argument,
    is_tensor,
    shape_of,
)
from normswap.graph.operators.weights import Weighted, is_transposed
from normswap.graph.propagation.owners import Owners
from normswap.graph.sites import Call, NormSite, describe
from normswap.norms.batch.frozen import check_statistics
from normswap.passes.edits import Edit
from normswap.passes.edits.own_copies import (
    DuplicateProducer,
    OwnCopy,
    PassInput,
    calls_of,
    holders,
    redirect,
)
from normswap.passes.forwards import Forwards

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def duplicate(
    seen: Capture, sites: Sequence[NormSite], inputs: Any
) -> tuple[list[Edit], dict[str, str]]:
    """The copies for the first of `sites` that may have one, and why those before it may not.

    Only the first, and those that share its layer, because another may be folded by the original
    after that.

    Args:
        seen: a capture of a model in eval mode with `inputs`.
    """
    copies, why = _Copies(seen, inputs), dict[str, str]()
    for site in sites:
        try:
            return copies.of_holder(site) or copies.of_calls(site, sites) or copies.edit(site), why
        except Unsupported as reason:
            why[site.name] = str(reason)
    return [], why


@dataclass(frozen=True)
class _Producer:
    """The module that is copied, as `DuplicateProducer` has it."""

    path: str
    weight: str
    channel_index: ChannelIndex
    bias_index: ChannelIndex | None


@dataclass(frozen=True)
class _ProducerRun:
    """One call of a BatchNorm.

    Attributes:
        stack: the calls of modules that it is made in, as (call, path), outermost first.
        source: what it normalizes, before the operators that keep it.
        between: these operators.
    """

    call: Call
    stack: list[tuple[str, str]]
    source: fx.Node
    between: frozenset[fx.Node]

    @property
    def region(self) -> Region:
        return self.call.region

    @property
    def is_used_otherwise(self) -> bool:
        """Whether anything besides the BatchNorm takes the value, so that it is still computed."""
        own = self.between | self.call.nodes
        return any(user not in own for node in (self.source, *self.between) for user in node.users)


class _Copies:
    """Finds what may be copied in a captured model."""

    def __init__(self, seen: Capture, inputs: Any) -> None:
        self._model, self._seen, self._index = seen.model, seen, seen.index
        self._owners = Owners(seen)
        self._context = self._owners.context(training=False)
        self._forwards = Forwards(seen, inputs)

    def of_holder(self, site: NormSite) -> list[Edit]:
        """The edit that gives a copy to a module that calls a shared one for `site` alone."""
        sources = _computed_by(site)
        runs = {self._call_of(source) for source in sources}
        weighted = all(isinstance(rule_of(source), Weighted) for source in sources)
        if not weighted or len(runs) != 1:
            return []
        caller, producer = runs.pop()
        # By its own path there: a module that several hold is known by the first of its paths.
        names = [n for n, m in caller.named_modules(remove_duplicate=False) if m is producer]
        path = join(self._index.paths[caller][0], names[0]) if len(names) == 1 else ""
        if not path or path in self._seen.called_outside:
            return []
        if len(holders(self._model, producer)) < 2 or any(getattr(producer, h) for h in _HOOKS):
            return []
        for node in self._index.region_of:
            if node not in sources and self._call_of(node) == (caller, producer):
                return []
        reason = "this call alone gives it what it normalizes: a copy takes memory and no time"
        return [OwnCopy(site=site.name, path=path, reason=reason)]

    def _call_of(self, node: fx.Node) -> tuple[nn.Module, nn.Module]:
        """The innermost module that `node` ran in, after the one that called it."""
        region = self._index.region_of[node]
        stack = [("", region.path), *region.stack(node)][-2:]
        caller, callee = (self._model.get_submodule(path) for _, path in (stack[0], stack[-1]))
        return caller, callee

    def of_calls(self, site: NormSite, sites: Sequence[NormSite]) -> list[Edit]:
        """The edits that copy a layer for each of its calls, if each is for one of `sites` alone.

        Raises:
            Unsupported: a copy cannot fold in an affine.
            NormswapError: running statistics that cannot be used (NaN, negative variance).
        """
        if not site.executions:
            raise Unsupported("no captured graph shows a call of it")
        producer = self._producer(site, _run(site, site.executions[0]))
        layer = self._model.get_submodule(producer.path)
        paths, computed = self._index.paths[layer], self._index.ran_in(layer)
        taken: dict[fx.Node, tuple[NormSite, _ProducerRun]] = {}
        for each in sites:
            try:
                runs = [_run(each, call) for call in each.executions]
            except Unsupported:
                continue
            taken |= {run.source: (each, run) for run in runs if run.source in computed}
        own = {each.name: each for each, _ in taken.values()}
        calls = sum(len(each.executions) for each in own.values())
        if taken.keys() != computed or calls != len(computed) or len(own) < 2:
            return []
        if any(path in self._seen.called_outside for path in paths) or any(
            run.is_used_otherwise for _, run in taken.values()
        ):
            return []
        for each, run in taken.values():
            (x, *_), y = run.source.all_input_nodes, run.source
            # Code between the two may read the shape of what will be the input.
            if self._producer(each, run) != producer or not is_tensor(x) or _form(x) != _form(y):
                return []
            self._check_plain(run, producer)
            self._check_writes(run)
        self._check_hooks([producer.path, *own])
        why = "its layer is called for such alone: a copy for each takes memory and no time"
        copies = [self._copy(each, producer, why, "", ()) for each in own.values()]
        reason = f"is copied for {', '.join(own)}"
        gone = PassInput(site=site.name, path=producer.path, reason=reason, aliases=paths)
        return [*copies, gone]

    def edit(self, site: NormSite) -> list[Edit]:
        """The edit that gives `site` a copy.

        Raises:
            Unsupported: it may have none, for the reason that the message gives.
            NormswapError: running statistics that cannot be used (NaN, negative variance).
        """
        runs = [_run(site, call) for call in site.executions]
        producer, *others = dict.fromkeys(self._producer(site, run) for run in runs)
        if others:
            raise Unsupported(f"{producer.path} is not all that it follows")
        work = sum(_multiply_adds(run.source) for run in runs if run.is_used_otherwise)
        affine = sum(prod(shape_of(run.source)) for run in runs)
        if work > affine:
            raise Unsupported(
                f"a copy of {producer.path} takes {work} multiply-adds, its affine {affine}"
            )
        for run in runs:
            self._check_plain(run, producer)
            self._check_writes(run)
        caller, calls = self._calls(runs, site.name, producer.path)
        alone = not any(run.is_used_otherwise for run in runs)
        cost = "memory and no time" if alone else f"{work} multiply-adds, its affine {affine}"
        why = f"a copy of {producer.path} takes {cost}"
        return [self._copy(site, producer, why, caller, calls)]

    def _copy(
        self, site: NormSite, producer: _Producer, why: str, caller: str, calls: tuple[int, ...]
    ) -> DuplicateProducer:
        norm = self._model.get_submodule(site.name)
        check_statistics(norm, site.name)
        edit = DuplicateProducer(
            site=site.name,
            path=site.name,
            reason=why,
            aliases=site.paths,
            tail=site.tail,
            producer=producer.path,
            weight=producer.weight,
            channel_index=producer.channel_index,
            bias_index=producer.bias_index,
            caller=caller,
            calls=calls,
        )
        rounds = edit.why_not(self._model.get_submodule(producer.path), norm)
        if rounds is not None:
            raise Unsupported(rounds)
        return edit

    def _producer(self, site: NormSite, run: _ProducerRun) -> _Producer:
        source, region = run.source, run.region
        rank, path = len(shape_of(source)), region.module_path(source)
        if site.num_features is None or not -rank <= site.channel_axis < rank:
            raise Unsupported("normalizes a value without that axis")
        layout = along(rank, site.channel_axis, torch.arange(site.num_features))
        rule = rule_of(source)
        if is_a(source, "embedding"):
            if layout.shape[-1] != layout.numel():
                raise Unsupported(f"normalizes another axis than the rows of {path}")
            table = argument(source, "weight")
            owner, weight = self._owners.of(region, path, table)
            channel_index, bias_index = ChannelIndex((1, layout.numel())), None
        elif isinstance(rule, Weighted) and has_argument(source, "weight"):
            if self._context.computed(argument(source, "weight")):
                raise Unsupported(f"{path} computes its weight in forward")
            (folding,) = rule.constraints(source, {source: layout}, self._context).foldings
            owner, weight, bias, _ = self._owners.weight_and_bias(folding)
            channel_index, bias_index = folding.channel_index, folding.bias_index
            if bias is None:
                raise Unsupported(f"{path} cannot be given a bias")
        else:
            raise Unsupported(f"its input comes from {describe(source, region)}")
        if owner != path:
            raise Unsupported(f"{path} computes with a weight of {owner}")
        return _Producer(self._index.first_path(path), weight, channel_index, bias_index)

    def _check_plain(self, run: _ProducerRun, producer: _Producer) -> None:
        """The producer runs one operator, with parameters of its own.

        Raises:
            Unsupported: it does more.
        """
        ran = run.region.ran[run.region.stack(run.source)[-1][0]]
        needed = {producer.weight} if producer.bias_index is None else {producer.weight, "bias"}
        if ran != [run.source] or not (
            needed <= self._model.get_submodule(producer.path)._parameters.keys()
        ):
            raise Unsupported(f"{producer.path} does more than the operator that is copied")

    def _calls(
        self, runs: Sequence[_ProducerRun], norm: str, producer: str
    ) -> tuple[str, tuple[int, ...]]:
        """The module whose forward calls the BatchNorm, and the calls as `DuplicateProducer` has
        them.

        Raises:
            Unsupported: the forward cannot be rewritten, or does not call both.
        """
        path, *others = dict.fromkeys(self._index.first_path(run.stack[-1][1]) for run in runs)
        name = path or "the model"
        if others or path in self._seen.called_outside:
            raise Unsupported(f"it is not called in {name} alone")
        if any(run.region.stack(run.source)[:-1] != run.stack for run in runs):
            raise Unsupported(f"what computes its input is not called in {name}, as it is")
        caller = self._model.get_submodule(path)
        graph, taken = copy.deepcopy(self._forwards.graph(caller)), dict[fx.Node, fx.Node]()
        for run in runs:
            aligned = align(self._index, run.region, run.stack[-1][0], graph, path)
            call, source = aligned[next(iter(run.call.nodes))], aligned[run.source]
            if len(source.args) + len(source.kwargs) != 1:
                raise Unsupported(f"{name} gives what computes its input more than one argument")
            if taken.setdefault(call, source) is not source:
                raise Unsupported(f"the forward of {name} could not be followed")
        norms, layers = (
            calls_of(self._model.get_submodule(each), caller, graph) for each in (norm, producer)
        )
        if taken.keys() != set(norms):
            raise Unsupported(f"the forward of {name} could not be followed")
        calls = tuple(layers.index(taken[call]) for call in norms)
        erased = redirect(graph, taken)
        self._check_hooks([norm, producer, *(join(path, child) for child in sorted(erased))])
        return path, calls

    def _check_writes(self, run: _ProducerRun) -> None:
        """What the copy reads is the same where the BatchNorm is called as where the producer was.

        Raises:
            Unsupported: something is written into it between them.
        """
        place, aliases = self._index.position_of, self._index.aliases(run.region)
        first, last = place[run.source], min(place[node] for node in run.call.nodes)
        for value in (run.source, *run.source.all_input_nodes):
            for node in aliases.writes(value):
                if first < place[node] < last and node not in run.between:
                    raise Unsupported("what computes its input is written into before it")

    def _check_hooks(self, paths: Iterable[str]) -> None:
        for path in paths:
            module = self._model.get_submodule(path)
            if any(getattr(module, hooks) for hooks in _HOOKS):
                raise Unsupported(f"{path} has a hook")


def _computed_by(site: NormSite) -> set[fx.Node]:
    """What computes the inputs of a BatchNorm, before operators that move elements.

    Empty where others take one of these values too, or it is not known.
    """
    sources, between = set[fx.Node](), set[fx.Node]()
    for call in site.executions:
        node = None if call.region.symbolic else call.input
        while node is not None and is_a(node, "same", "split", *MOVES):
            between.add(node)
            inputs = [each for each in sources_of(node) if is_tensor(each)] or sources_of(node)
            node = inputs[0] if len(inputs) == 1 else None
        if node is None:
            return set()
        sources.add(node)
    own = between.union(*(call.nodes for call in site.executions))
    alone = all(own.issuperset(node.users) for node in sources | between)
    return sources if alone else set()


def _run(site: NormSite, call: Call) -> _ProducerRun:
    region = call.region
    if region.symbolic:
        raise Unsupported("the dataflow is known in part only; give example inputs")
    if call.input is None:
        raise Unsupported("takes more than one value")
    stack = region.stack(next(iter(call.nodes)))
    depth = next(i for i, (_, path) in enumerate(stack) if path in site.paths)
    if not depth:
        raise Unsupported("is captured without what calls it")
    source, between = call.input, set[fx.Node]()
    while is_a(source, "same"):
        between.add(source)
        (source,) = sources_of(source)
    if _form(source) != _form(call.input):
        raise Unsupported("its dtype, device or layout in memory changes before it")
    return _ProducerRun(call, stack[:depth], source, frozenset(between))


def _form(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta["val"]
    return value.dtype, value.device, value.shape, value.stride()


def _multiply_adds(node: fx.Node) -> int:
    """Those of an embedding, a Linear or a convolution, without the bias."""
    if is_a(node, "embedding"):
        return 0
    # Each number of the output, for a transposed convolution of the input, meets a row of the
    # weight.
    seen = argument(node, "input") if is_transposed(node) else node
    return prod(shape_of(seen)) * prod(shape_of(argument(node, "weight"))[1:])
