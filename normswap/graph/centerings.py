"""Which LayerNorms of a model can be RMSNorms, and what must be centered for that.

A *centering* is what `projection` finds around the input of a LayerNorm: one
residual stream of a transformer, say. It frees all LayerNorms on it or none. A value on it that no
weight can center is centered explicitly where a module returns it; that is a pass over it, about
what two LayerNorms save, so it has to free as many.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, fx

from normswap.core.errors import Unsupported
from normswap.graph.formula import normalizing
from normswap.graph.operators.rule import argument
from normswap.graph.propagation.engine import Operators
from normswap.graph.propagation.position_map import Mapped
from normswap.graph.propagation.positions import channel_axes
from normswap.graph.propagation.projection import Projection, is_layer_norm
from normswap.graph.streams import Streams

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


class Centerings(Streams):
    """The centerings of a captured model; what it frees are the LayerNorms `wanted`."""

    def around(self, name: str) -> Centering:
        """The centering that frees the LayerNorm `name`, and all others that it frees with it.

        Raises:
            Unsupported: there is none; the message says what stops it.
        """
        site = self._sites[name]
        self._check_seen(site)
        for call in site.executions:
            node, _ = normalizing(self._index.model, site, call)
            if is_layer_norm(node) and argument(node, "eps") != site.eps:
                raise Unsupported(f"{site.cls} adds another eps than its own")
        projection = Projection(
            Operators(()), self._index, self._context, self._takers_of_gain, self._norm_calls
        )
        self._follow(projection, site)
        norms = self._on(projection)
        tensors = self._tensors(projection)
        outputs = self._outputs(projection)
        if len(norms) < FREES * len(outputs):
            reason = next(iter(projection.uncentered.values()))
            cost = _count(len(outputs), "explicit centering")
            gain = _count(len(norms), "LayerNorm")
            raise Unsupported(f"{reason}; {cost} for {gain} would not pay")
        return Centering(norms, tensors, outputs)

    # --- weights ----------------------------------------------------------------------------------

    def _tensors(self, projection: Projection) -> tuple[Centered, ...]:
        found: dict[Centered, None] = {}
        computed: dict[fx.Node, set[fx.Node]] = {}
        for producer in projection.producers.values():
            computed.setdefault(producer.weight, set()).update(producer.reads)
        for value, producer in sorted(projection.producers.items()):
            readers = computed[producer.weight]
            try:
                found |= dict.fromkeys(self._of(value, producer, readers, projection))
            except Unsupported as reason:
                projection.uncentered[value] = str(reason)
        for node, bias in projection.biases.items():
            readers = {each for each, read in projection.biases.items() if read is bias}
            found[Centered(*self._owner(node, bias, readers), vanishes=True)] = None
        return tuple(found)

    def _of(
        self, value: fx.Node, producer: Mapped, readers: set[fx.Node], projection: Projection
    ) -> list[Centered]:
        """The tensors that compute `value`."""
        product = projection.gains.get(value)
        gain = None if product is None else self._gain(product)
        path, weight = self._owner(value, producer.weight, readers)
        found = [Centered(path, weight, producer.axis, gain)]
        if producer.bias is not None:
            found.append(Centered(*self._owner(value, producer.bias, readers), gain=gain))
        return found

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


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number > 1)}"


def _channel_axis(layout: Tensor) -> int | None:
    """Counted from the end; None where they lie along several."""
    axes = channel_axes(layout)
    return axes[0] - layout.dim() if len(axes) == 1 else None
