"""Which LayerNorms of a model can be RMSNorms, and what must be centered for that.

A *centering* is what `projection` finds around the input of a LayerNorm: one
residual stream of a transformer, say. It frees all LayerNorms on it or none. A value on it that no
weight can center is centered explicitly where a module returns it; that is a pass over it, about
what two LayerNorms save, so it has to free as many.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from normswap.core.errors import Unsupported
from normswap.graph.capture import Capture
from normswap.graph.formula import normalizing
from normswap.graph.index import join
from normswap.graph.operators.layout import along
from normswap.graph.operators.operator import rule_of
from normswap.graph.operators.pointwise import Product
from normswap.graph.operators.rule import argument, shape_of
from normswap.graph.propagation.affines import Affines
from normswap.graph.propagation.engine import Operators
from normswap.graph.propagation.projection import (
    Producer,
    Projection,
    WrittenOut,
    channel_axes,
    input_of,
    is_layer_norm,
)
from normswap.graph.propagation.scale_shift import ScaleShift
from normswap.graph.propagation.unseen import Unseen
from normswap.graph.sites import NormSite

FREES = 2  # as many LayerNorms must every explicit centering free


@dataclass(frozen=True)
class Centered:
    """A tensor that is centered along one axis.

    Attributes:
        path, tensor: the module and the name.
        axis: that of the channels.
        gain: the gain per channel that it folds in first, as (path, name).
        vanishes: it is the same for all channels, so nothing is left of it.
    """

    path: str
    tensor: str
    axis: int = 0
    gain: tuple[str, str] | None = None
    vanishes: bool = False


@dataclass(frozen=True)
class Output:
    """The output of a module that is centered explicitly, along `axis` counted from the end."""

    path: str
    axis: int


@dataclass(frozen=True)
class Centering:
    """What centers the inputs of `norms`, names of LayerNorms, so that these need not do it."""

    norms: tuple[str, ...]
    tensors: tuple[Centered, ...]
    outputs: tuple[Output, ...]


class Centerings:
    """The centerings of a captured model.

    Args:
        wanted: the LayerNorms to free.
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
        self._written_out = {
            node: written
            for site in self._sites.values()
            for written in _written_out(seen.model, site)
            for node in written.nodes
        }

    def around(self, name: str) -> Centering:
        """The centering that frees the LayerNorm `name`, and all others that it frees with it.

        Raises:
            Unsupported: there is none; the message says what stops it.
        """
        site = self._sites[name]
        self._owners.check_seen(site)
        if any(call.region.symbolic for call in site.executions):
            raise Unsupported("no shape is known; give example inputs")
        for call in site.executions:
            node, _ = normalizing(self._index.model, site, call)
            if is_layer_norm(node) and argument(node, "eps") != site.eps:
                raise Unsupported(f"{site.cls} adds another eps than its own")
        projection = Projection(
            Operators(()),
            self._index,
            self._context,
            self._takers_of_gain,
            self._written_out,
        )
        projection.propagate(dict(self._inputs(site)))
        for value in projection.known:
            self._unseen.check(self._index.region_of[value], [value])
        norms = tuple(
            name
            for name, each in self._sites.items()
            if self._nodes(each) and projection.norms.issuperset(self._nodes(each))
        )
        tensors = self._tensors(projection)
        outputs = self._outputs(projection)
        if len(norms) < FREES * len(outputs):
            reason = next(iter(projection.uncentered.values()))
            cost = _count(len(outputs), "explicit centering")
            gain = _count(len(norms), "LayerNorm")
            raise Unsupported(f"{reason}; {cost} for {gain} would not pay")
        return Centering(norms, tensors, outputs)

    def _inputs(self, site: NormSite) -> Iterator[tuple[fx.Node, Tensor]]:
        """What its calls normalize, with the layout of the channels."""
        for node in self._nodes(site):
            written = self._written_out.get(node)
            value = input_of(node) if written is None else written.input
            rank = len(shape_of(value))
            axis = -1 if written is None else written.channel_axis
            channels = shape_of(value)[axis]
            yield value, along(rank, axis % rank, torch.arange(channels))

    def _nodes(self, site: NormSite) -> list[fx.Node]:
        """What stands for its calls: torch's operator, or what a written out one returns."""
        inside = [node for call in site.executions for node in call.nodes]
        own = {written.output for node, written in self._written_out.items() if node in inside}
        return sorted(own) or [node for node in inside if is_layer_norm(node)]

    # --- weights ----------------------------------------------------------------------------------

    def _tensors(self, projection: Projection) -> tuple[Centered, ...]:
        found: dict[Centered, None] = {}
        computed: dict[fx.Node, set[fx.Node]] = {}
        for value, producer in projection.producers.items():
            computed.setdefault(producer.weight, set()).add(value)
        for value, producer in sorted(projection.producers.items()):
            readers = set(value.users) if producer.weight is value else computed[producer.weight]
            try:
                found |= dict.fromkeys(self._of(value, producer, readers, projection))
            except Unsupported as reason:
                projection.uncentered[value] = str(reason)
        for node, bias in projection.biases.items():
            readers = {each for each, read in projection.biases.items() if read is bias}
            found[Centered(*self._owner(node, bias, readers), vanishes=True)] = None
        return tuple(found)

    def _of(
        self, value: fx.Node, producer: Producer, readers: set[fx.Node], projection: Projection
    ) -> list[Centered]:
        """The tensors that compute `value`."""
        product = projection.gains.get(value)
        gain = None if product is None else self._gain(product)
        path, weight = self._owner(value, producer.weight, readers)
        found = [Centered(path, weight, producer.axis, gain)]
        if producer.bias is not None:
            found.append(Centered(*self._owner(value, producer.bias, readers), gain=gain))
        return found

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

    # --- outputs of modules -----------------------------------------------------------------------

    def _outputs(self, projection: Projection) -> tuple[Output, ...]:
        """Where all that no weight can center is centered explicitly.

        Raises:
            Unsupported: one of it is no output of a module; the message says what computes it.
        """
        found: dict[Output, None] = {}
        for value, reason in sorted(projection.uncentered.items()):
            path, returned = self._returning(value)
            axis = _channel_axis(projection.known[value])
            for each in returned:
                other = projection.known[each] if each in projection.uncentered else None
                if other is None or _channel_axis(other) != axis:
                    raise Unsupported(reason)
            if axis is None or not returned or not self._owners.is_alone(path):
                raise Unsupported(reason)
            module = self._index.modules[path]
            if module._forward_hooks or "forward" in vars(module):
                raise Unsupported(f"{reason}; {path} has a hook or a replaced forward")
            found[Output(path, axis)] = None
        return tuple(found)

    def _returning(self, value: fx.Node) -> tuple[str, list[fx.Node | None]]:
        """The module without children that returns `value`, and what each of its calls returns.

        Empty where it is none; a call that returns several values, or none, has None.
        """
        module = self._index.module_of(value)
        if module is self._index.model or next(module.children(), None) is not None:
            return "", []
        runs = self._index.runs.get(module, ())
        outputs = [_returned(run.nodes) for run in runs if not run.region.symbolic]
        return (self._index.paths[module][0], outputs) if value in outputs else ("", [])


def _returned(nodes: Iterable[fx.Node]) -> fx.Node | None:
    """The one of `nodes` that others take; None where there is not one."""
    inside = set(nodes)
    returned = [node for node in inside if not inside.issuperset(node.users)]
    return returned[0] if len(returned) == 1 else None


def _written_out(model: nn.Module, site: NormSite) -> Iterator[WrittenOut]:
    """The calls of a LayerNorm that is arithmetic, or has casts around torch's operator."""
    for call in site.executions:
        try:
            node, _ = normalizing(model, site, call)
        except Unsupported:
            continue
        if not is_layer_norm(node) and call.input is not None:
            yield WrittenOut(call.input, node, call.nodes, site.channel_axis)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number > 1)}"


def _channel_axis(layout: Tensor) -> int | None:
    """Counted from the end; None where they lie along several."""
    axes = channel_axes(layout)
    return axes[0] - layout.dim() if len(axes) == 1 else None
