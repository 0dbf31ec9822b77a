"""The streams of a captured model: values that a map of each position changes together.

A *stream* is what `graph.propagation.position_map` finds around the inputs of a normalization: the
residual stream of a transformer, say. `Streams` is what all kinds of maps share: where the
normalizations are on it, and whose tensors compute it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from normswap.core.errors import Unsupported
from normswap.graph.capture import Capture
from normswap.graph.formula import normalizing
from normswap.graph.index import join
from normswap.graph.operators import is_a
from normswap.graph.operators.layout import along
from normswap.graph.operators.operator import rule_of
from normswap.graph.operators.pointwise import Product
from normswap.graph.operators.rule import shape_of
from normswap.graph.propagation.affines import Affines
from normswap.graph.propagation.position_map import NormCall, PositionMap
from normswap.graph.propagation.scale_shift import ScaleShift
from normswap.graph.propagation.unseen import Unseen
from normswap.graph.sites import NormSite


class Streams:
    """The streams of a captured model.

    Args:
        wanted: the normalizations that they are about.
        training: what is found must hold while the model trains.
        assume_example: the model is called in no other way than in the example.
    """

    def __init__(
        self,
        seen: Capture,
        sites: Sequence[NormSite],
        wanted: Iterable[NormSite],
        *,
        training: bool = False,
        assume_example: bool = False,
    ) -> None:
        names = {site.name for site in wanted}
        self._index = seen.index
        self._sites = {site.name: site for site in sites if site.name in names}
        self._affines = Affines(seen, sites, training=training, assume_example=assume_example)
        self._owners = self._affines.owners
        self._unseen = Unseen(seen, sites, assume_example=assume_example)
        self._context = self._owners.context(training=training)
        self._norm_calls = {
            node: call
            for site in self._sites.values()
            for call in _norm_calls(seen.model, site)
            for node in call.nodes
        }

    def _check_seen(self, site: NormSite) -> None:
        """Raise Unsupported unless the calls of `site` are known, with their shapes."""
        self._owners.check_seen(site)
        if any(call.region.symbolic for call in site.executions):
            raise Unsupported("no shape is known; give example inputs")

    def _follow(self, stream: PositionMap, site: NormSite) -> None:
        """Follow the change of what `site` normalizes.

        Raises:
            Unsupported: something stops it.
        """
        self._spread(stream, dict(self._inputs(site)))

    def _spread(self, stream: PositionMap, seeds: Mapping[fx.Node, Tensor]) -> None:
        """As `_follow`, from these values with their layouts."""
        stream.propagate(seeds)
        for value in stream.known:
            self._unseen.check(self._index.region_of[value], [value])

    def _on(self, stream: PositionMap) -> tuple[str, ...]:
        """The normalizations whose every call is on the stream."""
        return tuple(
            name
            for name, each in self._sites.items()
            if self._nodes(each) and stream.norms.issuperset(self._nodes(each))
        )

    def _inputs(self, site: NormSite) -> Iterator[tuple[fx.Node, Tensor]]:
        """What its calls normalize, with the layout of the channels."""
        for node in self._nodes(site):
            call = self._norm_calls.get(node)
            value = node.args[0] if call is None else call.input
            assert isinstance(value, fx.Node)
            rank = len(shape_of(value))
            axis = -1 if call is None else call.channel_axis
            channels = shape_of(value)[axis]
            yield value, along(rank, axis % rank, torch.arange(channels))

    def _nodes(self, site: NormSite) -> list[fx.Node]:
        """What stands for its calls: torch's operator, or what a written out one returns."""
        inside = [node for call in site.executions for node in call.nodes]
        own = {call.output for node, call in self._norm_calls.items() if node in inside}
        return sorted(own) or [node for node in inside if is_a(node, "normalization")]

    def _owner(self, node: fx.Node, tensor: fx.Node, readers: set[fx.Node]) -> tuple[str, str]:
        """The module and the name of the `tensor` that `node` reads.

        Raises:
            Unsupported: others than `readers` read it, too.
        """
        region = self._index.region_of[node]
        path, name = self._owners.of(region, region.module_path(node), tensor)
        self._owners.check_reads(path, [name], readers)
        own = self._index.tensor(join(path, name))
        if own is not None and len(self._index.owners(own)) > 1:
            raise Unsupported(f"{join(path, name)} is tied to another module")
        return path, name

    def _gain(self, product: fx.Node) -> tuple[str, str]:
        return self._owner(product, self._factor(product), {product})

    def _factor(self, product: fx.Node) -> fx.Node:
        rule = rule_of(product)
        assert isinstance(rule, Product)
        gain = rule.constant(product, self._context)
        assert gain is not None
        return gain

    def _takers_of_gain(self, product: fx.Node, value: fx.Node, layout: Tensor) -> list[fx.Node]:
        """The operators before `product` that can multiply by its gain themselves."""
        self._gain(product)  # it is read nowhere else
        gain = self._context.constant(self._factor(product))
        assert gain is not None
        scale = gain.detach().double().flatten()
        numbers = ScaleShift(scale, torch.zeros_like(scale), invertible=False)
        takers = self._affines.folds({value: layout}, {product: None}, numbers, upstream=True)
        for taker in takers:
            if (
                taker.side != "out"
                or taker.normalization
                or taker.channel_index.channels is not None
            ):
                name = join(taker.path, taker.weight)
                raise Unsupported(f"{name} cannot fold in the gain after it")
        return [node for taker in takers for node in taker.nodes]


def _norm_calls(model: nn.Module, site: NormSite) -> Iterator[NormCall]:
    """The calls of a normalization that is arithmetic, or has casts around torch's operator."""
    for call in site.executions:
        try:
            node, axis = normalizing(model, site, call)
        except Unsupported:
            continue
        if not is_a(node, "normalization") and call.input is not None:
            axis = axis - len(shape_of(call.input)) if axis > 0 else axis
            yield NormCall(call.input, node, call.nodes, axis, site.kind)
