"""Which RMSNorms of a model are redundant: all that reads one is normalized again.

What an RMSNorm does is to multiply each position by one positive number. Where all that reads it
ends in normalizations of elements with one and the same number (`graph.propagation.set_scale`),
the model computes the same without it, up to the eps of those.
"""

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor, fx, nn

from normswap.core.errors import Unsupported
from normswap.graph.capture import Capture
from normswap.graph.formula import normalizing
from normswap.graph.functional_norms import functional_kind
from normswap.graph.norm_modules import formula
from normswap.graph.operators.rule import shape_of
from normswap.graph.propagation.owners import Owners
from normswap.graph.propagation.set_scale import SampleNorm, SetScale
from normswap.graph.propagation.unseen import Unseen
from normswap.graph.sites import Call, NormSite, describe

_OF_SAMPLE = ("layer", "rms", "group", "instance")


class Redundancies:
    """Tells which normalizations of a captured model are redundant.

    Args:
        sites: all normalizations of the model.
        assume_example: the model is called in no other way than in the example.
    """

    def __init__(self, seen: Capture, sites: Sequence[NormSite], *, assume_example: bool) -> None:
        self._index, self._owners = seen.index, Owners(seen)
        self._context = self._owners.context(training=False)
        self._unseen = Unseen(seen, sites, assume_example=assume_example)
        self._aliases = {each.graph: self._index.aliases(each).copy() for each in seen.regions}
        self._names = {
            node: site.name for site in sites for call in site.executions for node in call.nodes
        }
        self._norms = {
            node: norm
            for site in sites
            for call in site.executions
            for norm in self._written_out(site, call)
            for node in norm.nodes
        }

    def ends(self, site: NormSite) -> tuple[str, ...]:
        """The normalizations that make `site` redundant, in order of execution.

        Raises:
            Unsupported: it is not redundant; the message says why.
        """
        self._check(site)
        seeds, count = dict[fx.Node, Tensor](), 0
        for call in site.executions:
            value = _returned(call)
            rank = len(shape_of(value))
            over = _over(self._index.modules[site.name], site, rank)
            if over is None:
                raise Unsupported("its class does not say what it takes statistics over")
            sizes = [1 if axis in over else size for axis, size in enumerate(shape_of(value))]
            # The first axis is that of the samples, which nothing mixes, unless there is no other.
            told_apart = [n for n in range(rank) if n not in over and (n > 0 or rank == 2)]
            if any(sizes[axis] == 1 for axis in told_apart):
                raise Unsupported("an axis of length 1 does not tell positions apart")
            seeds[value] = torch.arange(count, count + prod(sizes)).view(sizes)
            count += prod(sizes)
        scale = SetScale(self._index, self._context, self._norms)
        scale.follow(seeds)
        if not scale.ends:
            raise Unsupported("no normalization reads it")
        for value in scale.known:
            self._unseen.check(self._index.region_of[value], [value])
        return tuple(dict.fromkeys(map(self._name_of, scale.ends)))

    def removed(self, site: NormSite) -> None:
        """Note that `site`, which is redundant, returns what it is given from now on."""
        for call in site.executions:
            assert call.input is not None
            self._aliases[call.region.graph].passed(call.input, _returned(call))

    def _check(self, site: NormSite) -> None:
        """Raise Unsupported unless each call of `site` is an RMSNorm that could be the identity."""
        if site.kind != "rms":
            raise Unsupported(f"is {site.kind} normalization, which takes more than a scale off")
        self._owners.check_seen(site)
        norm = self._index.modules[site.name]
        held = formula(norm)
        if site.tail or norm._forward_hooks or norm._forward_pre_hooks:
            raise Unsupported("does more than normalize")
        bias = None if held is None or held.bias is None else getattr(norm, held.bias)
        if bias is not None and (bias.is_meta or bool(bias.any())):
            raise Unsupported("has a bias")
        for call in site.executions:
            if call.region.symbolic:
                raise Unsupported("no shape is known; give example inputs")
            given, returned = call.input, _returned(call)
            if given is None or given.meta["val"].dtype != returned.meta["val"].dtype:
                raise Unsupported("returns another type than it takes")
            self._aliases[call.region.graph].check_passed(given, returned, call.nodes)

    def _written_out(self, site: NormSite, call: Call) -> Iterator[SampleNorm]:
        """A call of a normalization by statistics of the sample that no operator of torch is."""
        if site.kind not in _OF_SAMPLE or site.statistics != "sample" or call.region.symbolic:
            return
        if call.input is None or any(functional_kind(node) == site.kind for node in call.nodes):
            return
        try:
            normalizing(self._index.model, site, call)
        except Unsupported:
            return
        rank = len(shape_of(call.input))
        over = _over(self._index.modules[site.name], site, rank) or tuple(range(1, rank))
        yield SampleNorm(call.input, call.nodes, over)

    def _name_of(self, node: fx.Node) -> str:
        return self._names.get(node) or describe(node, self._index.region_of[node])


def _over(norm: nn.Module, site: NormSite, rank: int) -> tuple[int, ...] | None:
    """The axes that the elements with one statistic go along; None where they are not known."""
    declared = hasattr(type(norm), "norm_kind")
    per_position = getattr(norm, "per_position", None) if declared else True
    if site.kind in ("layer", "rms") and per_position is not None:
        return (site.channel_axis % rank,) if per_position else tuple(range(1, rank))
    if site.kind == "instance" and not declared:
        return tuple(range(2, rank))
    return None


def _returned(call: Call) -> fx.Node:
    """The value that a normalization returns.

    Raises:
        Unsupported: it returns no one value.
    """
    if call.output is None:
        raise Unsupported("returns no one value")
    return call.output
