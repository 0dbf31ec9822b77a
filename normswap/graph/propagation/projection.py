"""What travels: the projection that takes the mean over the channels off a value.

LayerNorm(x) = RMSNorm(P x) with the projection P = I - 1 1^T / C (Jiang et al. 2023, arXiv
2305.14858, section 3), and a LayerNorm sees no difference between x and P x. So the values that
feed one may be P x instead, if everything that touches them agrees. P is linear, acts on each
position by itself and treats all channels alike; that decides what an operator does with it:

1. It passes where positions move as a whole, are added, averaged or mixed with one another, or are
   multiplied by what is the same for all channels of a position.
2. Convolutions, Linears, embeddings and constants compute P y from P W and P b.
3. A gain per channel in between has to be moved into them first.
4. A LayerNorm over the same channels ends it.
5. Everything else that takes a value would see that its mean is gone, so there is no centering
   then. Such is a concatenation along the channels before another LayerNorm (Swin's patch merging):
   that sees the means of its parts beside one another.
6. Everything else that computes a value leaves it uncentered, for an explicit centering.

An operator that writes into its input is no different: what shares the memory is a view or the
value itself, and loses its mean as well.

The layout of a value (`graph.operators.layout`) says which channel each element is. Where channels
move apart (in shift networks, say) that is not enough: what acts on each position by itself does
not commute with that. So positions are followed as well (`moved_positions`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, fx

from normswap.core.errors import Unsupported
from normswap.graph.index import Index
from normswap.graph.operators import is_a, operator_of
from normswap.graph.operators.layout import FREE, along, compressed, of_operand
from normswap.graph.operators.moving import Moving, positions_of
from normswap.graph.operators.operator import WEIGHTED, rule_of
from normswap.graph.operators.pointwise import Product, Same, Sum
from normswap.graph.operators.rule import (
    Context,
    Layouts,
    argument,
    has_argument,
    is_tensor,
    shape_of,
)
from normswap.graph.operators.windows import Window
from normswap.graph.propagation.engine import Operators, Propagation


def channel_axes(layout: Tensor) -> tuple[int, ...]:
    """The axes that the channels lie along."""
    return tuple(axis for axis, size in enumerate(layout.shape) if size > 1)


def moved_positions(node: fx.Node, known: Layouts, context: Context) -> dict[fx.Node, Tensor]:
    """The layouts of the output and of all inputs of an operator that moves elements.

    Args:
        known: the layout of the output, or of at least one input.

    Raises:
        Unsupported: channels of several positions meet in one.
    """
    call = node.args[0]
    if not hasattr(node.target, "_schema"):  # one of several outputs
        assert isinstance(call, fx.Node)
        if not is_a(call, "split"):
            raise Unsupported(f"{call.name} has several outputs")
    positions = positions_of(node, known, context)
    sources, shapes, position = positions.sources, positions.shapes, positions.position
    layout = known.get(node)
    if layout is None:
        parts = [
            known[source].expand(shape).flatten()
            if source in known
            else torch.full((prod(shape),), FREE)
            for source, shape in zip(sources, shapes, strict=True)
        ]
        layout = compressed(torch.cat([*parts, torch.tensor([FREE])])[position])
    forced = {node: layout}
    wanted, flat = layout.expand(position.shape).flatten(), position.flatten()
    start, numbers = 0, []
    for source, shape in zip(sources, shapes, strict=True):
        mine = (flat >= start) & (flat < start + prod(shape))
        found = torch.full((prod(shape),), FREE)
        found[flat[mine] - start] = wanted[mine]
        found = compressed(found.view(shape))
        if mine.any():
            forced[source] = found
        numbers.append(start + _numbered(found, shape))
        start += prod(shape)
    # All channels of a position come from one position, or from the zeros of a padding.
    origin = torch.cat([*numbers, torch.tensor([-1])])[position]
    over = channel_axes(layout)
    if not torch.equal(origin.amin(over), origin.amax(over)):
        raise Unsupported("channels of several positions meet in one")
    return forced


def _numbered(layout: Tensor, shape: tuple[int, ...]) -> Tensor:
    """For each element of a value of `shape` the number of its position, flat."""
    axes = channel_axes(layout)
    sizes = [1 if axis in axes else size for axis, size in enumerate(shape)]
    return torch.arange(prod(sizes)).view(sizes).expand(shape).flatten()


# (product, the value that it scales by a gain, the layout of that) -> the operators that can do so
# themselves; raises Unsupported where none can.
TakesGain = Callable[[fx.Node, fx.Node, Tensor], Iterable[fx.Node]]


def input_of(norm: fx.Node) -> fx.Node:
    """What a call of a LayerNorm normalizes."""
    value = norm.args[0]
    assert isinstance(value, fx.Node)
    return value


def is_layer_norm(node: fx.Node) -> bool:
    """Whether `node` is the call of a LayerNorm."""
    row = operator_of(node)
    return row is not None and row.normalizes == "layer"


@dataclass(frozen=True)
class WrittenOut:
    """A call of a LayerNorm that is not torch's operator, but the arithmetic of it.

    Attributes:
        input: what it normalizes.
        output: what it returns; it stands for the call among the `norms` of a `Projection`.
        nodes: all that ran inside.
        channel_axis: of the channels that it normalizes over.
    """

    input: fx.Node
    output: fx.Node
    nodes: frozenset[fx.Node]
    channel_axis: int


@dataclass(frozen=True)
class Producer:
    """A weight and a bias that are centered along one axis, so that what they compute is.

    Attributes:
        weight: a constant may be the value itself.
        axis: that of the output channels in the weight; in the bias there is no other.
    """

    weight: fx.Node
    bias: fx.Node | None
    axis: int


class Projection(Propagation):
    """The values that lose their mean together.

    Args:
        takes_gain: how the gain of a product is moved.
        written_out: the calls of LayerNorms that are arithmetic, by every node in them.

    Attributes:
        norms: the calls of LayerNorms that take one of the values.
        producers: for each value that a weight or a constant computes, what has to be centered.
        gains: for some of these the product after it whose gain per channel it folds in first.
        biases: for each operator that mixes positions its bias, the same for all channels, of which
            P leaves nothing.
        uncentered: values whose producer cannot be centered, and why.
    """

    def __init__(
        self,
        operators: Operators,
        index: Index,
        context: Context,
        takes_gain: TakesGain,
        written_out: Mapping[fx.Node, WrittenOut],
    ) -> None:
        super().__init__(operators, index, context)
        self.takes_gain, self.written_out = takes_gain, written_out
        self.norms: set[fx.Node] = set()
        self.producers: dict[fx.Node, Producer] = {}
        self.gains: dict[fx.Node, fx.Node] = {}
        self.biases: dict[fx.Node, fx.Node] = {}
        self.uncentered: dict[fx.Node, str] = {}

    def forced(self, node: fx.Node, value: fx.Node) -> Mapping[fx.Node, Tensor]:
        try:
            forced = self._passed(node, value)
            for other, layout in forced.items():
                if not _is_whole(layout):
                    raise Unsupported(
                        f"{self.name_of(other)} has not all its channels in one position"
                    )
            return forced
        except Unsupported as reason:
            if node is not value:
                raise
            self.uncentered[value] = str(reason)
            return {}

    def _passed(self, node: fx.Node, value: fx.Node) -> dict[fx.Node, Tensor]:
        written = self.written_out.get(node)
        if written is not None:
            return self._normalized_by(written, value)
        if is_layer_norm(node) and node is not value:
            return self._normalized(node, value)
        if is_tensor(node) and self.context.constant(node) is not None:
            return self._constant(node)
        rule = rule_of(node)
        if isinstance(rule, Product):
            return self._multiplied(node, value, rule)
        if is_a(node, "embedding") and node is value:
            return self._produces(node, argument(node, "weight"), None, 1)
        if is_a(node, *WEIGHTED):
            return self._mixed(node, value) or self._weighted(node, value)
        try:
            if isinstance(rule, Moving):
                return moved_positions(node, self.known, self.context)
            if isinstance(rule, (Same, Sum)) or (isinstance(rule, Window) and not rule.positive):
                forced = dict(rule.propagate(node, self.known, self.context))
                constraints = rule.constraints(node, {**self.known, **forced}, self.context)
                if any(equation.added for equation in constraints.equations):
                    raise Unsupported("a number is added between them")
                return forced
        except Unsupported as reason:
            raise Unsupported(f"{reason} ({self.name_of(node)})") from reason
        raise self._stopped(node, value)

    def _normalized(self, node: fx.Node, value: fx.Node) -> dict[fx.Node, Tensor]:
        layout, shape = self.known[value], list(argument(node, "normalized_shape"))
        if value is not input_of(node) or shape != [layout.numel()] or layout.shape[-1] == 1:
            raise self._stopped(node, value)
        self.norms.add(node)
        return {}

    def _normalized_by(self, norm: WrittenOut, value: fx.Node) -> dict[fx.Node, Tensor]:
        layout = self.known[value]
        if value is not norm.input or layout.shape[norm.channel_axis] != layout.numel():
            raise self._stopped(norm.output, value)
        self.norms.add(norm.output)
        return {}

    # --- products ---------------------------------------------------------------------------------

    def _multiplied(self, node: fx.Node, value: fx.Node, rule: Product) -> dict[fx.Node, Tensor]:
        rank = len(shape_of(node))
        layout = self.known[value]
        layout = layout.view(*[1] * (rank - layout.dim()), *layout.shape)
        factors = [each for each in node.args[:2] if isinstance(each, fx.Node)]  # a square has two
        carrying = [each for each in factors if _varies(each, rank, channel_axes(layout))]
        gain = rule.constant(node, self.context)
        if gain in carrying and len(carrying) == 2:
            if prod(shape_of(gain)) != layout.numel():
                raise Unsupported(f"the gain of {self.name_of(node)} is none per channel")
            carrying.remove(gain)
            self._takes_gain(node, carrying[0], layout)
        if len(carrying) != 1 or carrying[0] not in rule.numerators(node):
            raise self._stopped(node, value)
        return {node: layout, carrying[0]: of_operand(layout, shape_of(carrying[0]))}

    def _takes_gain(self, node: fx.Node, value: fx.Node, layout: Tensor) -> None:
        if self.context.training:
            raise Unsupported(f"a gain that trains lies between them ({self.name_of(node)})")
        in_order = of_operand(_in_order(layout), shape_of(value))
        for taker in self.takes_gain(node, value, in_order):
            if self.gains.setdefault(taker, node) is not node:
                raise Unsupported(f"{self.name_of(taker)} would fold in two gains")

    # --- weights ----------------------------------------------------------------------------------

    def _mixed(self, node: fx.Node, value: fx.Node) -> dict[fx.Node, Tensor]:
        """A matrix product over positions: P (x W + b) = (P x) W for b the same for all channels.

        Nothing where it is one over channels.
        """
        layout = self.known[value]
        if not is_a(node, "linear", "matmul"):
            return {}
        left, right = node.args[:2]
        assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
        if value is not right and layout.shape[-1] == 1 and layout.dim() == len(shape_of(left)):
            batch = tuple(axis for axis in channel_axes(layout) if axis < layout.dim() - 2)
            if right in self.known or _varies(right, layout.dim(), batch):
                raise self._stopped(node, value)
            bias = argument(node, "bias") if is_a(node, "linear") else None
            if bias is not None and self.context.training:
                raise Unsupported(f"the bias of {self.name_of(node)} would not train any more")
            if bias is not None:
                self.biases[node] = bias
            return {node: layout, left: layout}
        if value is not left and layout.shape[-1] > 1 and not is_a(node, "linear"):
            if left in self.known or self.context.constant(right) is not None:
                return {}
            rank = len(shape_of(node))
            out = along(rank, rank - 1, layout.flatten())
            return {node: out, right: of_operand(out, shape_of(right))}
        return {}

    def _weighted(self, node: fx.Node, value: fx.Node) -> dict[fx.Node, Tensor]:
        if value is not node:
            raise self._stopped(node, value)
        rule, own = rule_of(node), {node: self.known[node]}
        assert rule is not None
        if rule.propagate(
            node, own, self.context
        ):  # a weight that is computed would change with it
            raise self._stopped(node, value)
        (each,) = rule.constraints(node, own, self.context).foldings
        if has_argument(node, "groups") and int(argument(node, "groups")) > 1:
            raise Unsupported(f"the groups of {self.name_of(node)} do not mix")
        (axis,) = (axis for axis, size in enumerate(each.channel_index.shape) if size > 1)
        return self._produces(node, each.weight, each.bias, axis)

    def _constant(self, value: fx.Node) -> dict[fx.Node, Tensor]:
        axes = channel_axes(self.known[value])
        if len(axes) > 1:
            raise Unsupported(f"the channels of {self.name_of(value)} lie along several axes")
        self.producers[value] = Producer(value, None, axes[0])
        return {}

    def _produces(
        self, node: fx.Node, weight: fx.Node, bias: fx.Node | None, axis: int
    ) -> dict[fx.Node, Tensor]:
        """`node` is centered by `weight`, and so is all else that is computed with it."""
        layout, forced = self.known[node], {}
        from_the_end = channel_axes(layout)[0] - layout.dim()
        for user in weight.users:
            if user.target is not node.target:
                raise Unsupported(f"the weight of {self.name_of(node)} is also used elsewhere")
            rank = len(shape_of(user))
            forced[user] = along(rank, rank + from_the_end, layout.flatten())
        self.producers[node] = Producer(weight, bias, axis)
        return forced

    # --- words ------------------------------------------------------------------------------------

    def _stopped(self, node: fx.Node, value: fx.Node) -> Unsupported:
        if node is value:
            return Unsupported(f"its input comes from {self.name_of(value)}")
        return Unsupported(f"{self.name_of(value)} is also used by {self.name_of(node)}")


def _in_order(layout: Tensor) -> Tensor:
    return torch.arange(layout.numel()).view(layout.shape)


def _is_whole(layout: Tensor) -> bool:
    """Whether the layout holds every channel once, so that each position has a mean."""
    channels = layout.flatten().sort().values
    return len(channels) > 1 and torch.equal(channels, torch.arange(len(channels)))


def _varies(factor: fx.Node, rank: int, axes: tuple[int, ...]) -> bool:
    """Whether a factor of a product of `rank` axes varies along any of `axes`."""
    shape = (1,) * (rank - len(shape_of(factor))) + shape_of(factor)
    return any(shape[axis] > 1 for axis in axes)
