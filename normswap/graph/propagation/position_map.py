"""What travels: a linear map M of the channels, the same at each position, y' = M y.

The values that change together are M y instead of y, if everything that touches them agrees. M acts
on each position by itself; that decides what an operator does with it:

1. It passes where positions move as a whole, are added, averaged or mixed with one another, or are
   multiplied by what is the same for all channels of a position.
2. Convolutions, Linears, embeddings and constants compute M y from M W and M b.
3. A gain per channel in between has to be moved into them first.

A subclass is one kind of map: it says what a normalization does with it, what a weight does that
takes such a value, and what everything else does. `projection` and `rotation` are two.

An operator that writes into its input is no different: what shares the memory is a view or the
value itself, and changes as well.

Where positions go apart, as a class token and patches do, or come together, as in a concatenation,
some may be known to change before others do. A weight, and all else that treats positions alike,
changes all of those that it computes or takes.

The layout of a value (`graph.operators.layout`) says which channel each element is. Where channels
move apart (in shift networks, say) that is not enough: what acts on each position by itself does
not commute with that. So positions are followed as well (`moved_positions`). A position may hold
every channel several times, as those of several heads or of pixels side by side: M acts on each
such *block*, which is followed as a position of its own.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar

import torch
from torch import Tensor, fx

from normswap.core.errors import Unsupported
from normswap.graph.operators import is_a, operator_of
from normswap.graph.operators.layout import NONE, along, at_every_position, of_operand
from normswap.graph.operators.moving import Moving
from normswap.graph.operators.operator import WEIGHTED, rule_of
from normswap.graph.operators.pointwise import Product, Same, Sum, is_cast
from normswap.graph.operators.rows import is_computed
from normswap.graph.operators.rule import (
    argument,
    has_argument,
    is_tensor,
    operands,
    shape_of,
)
from normswap.graph.operators.windows import Window
from normswap.graph.propagation.engine import Propagation
from normswap.graph.propagation.positions import blocks_of, channel_axes, moved_positions

# (product, the value that it scales by a gain, the layout of that) -> the operators that can do so
# themselves; raises Unsupported where none can.
TakesGain = Callable[[fx.Node, fx.Node, Tensor], Iterable[fx.Node]]


@dataclass(frozen=True)
class NormCall:
    """A call of a normalization that is more than one operator of torch.

    Attributes:
        input: what it normalizes.
        output: what it returns; it stands for the call.
        nodes: all that ran inside.
        channel_axis: of the channels that it normalizes over, counted from the end.
        kind: of the normalization.
    """

    input: fx.Node
    output: fx.Node
    nodes: frozenset[fx.Node]
    channel_axis: int
    kind: str = "layer"


@dataclass(frozen=True)
class Mapped:
    """A weight and a bias that the map is applied to along one axis.

    Attributes:
        weight: a constant may be the value itself.
        axis: that of the channels in the weight; in the bias there is no other.
        starts: where each block of channels begins along that axis.
        reads: the nodes that read them.
    """

    weight: fx.Node
    bias: fx.Node | None
    axis: int
    starts: tuple[int, ...] = (0,)
    reads: tuple[fx.Node, ...] = ()


@dataclass(eq=False)
class PositionMap(Propagation):
    """The values that change together by a linear map of each position.

    Args:
        takes_gain: how the gain of a product is moved.
        norm_calls: the calls of normalizations that are more than one operator, by every node in
            them.

    Attributes:
        norms: of each call of a normalization that takes one of the values what it returns.
        producers: for each value that a weight or a constant computes, what has to be mapped.
        gains: for some of these the product after it whose gain per channel it folds in first.
        size: how many channels the map has.
    """

    whole_values: ClassVar[bool] = True  # where one position changes, all of the value do

    takes_gain: TakesGain
    norm_calls: Mapping[fx.Node, NormCall]
    norms: set[fx.Node] = field(init=False, default_factory=set)
    producers: dict[fx.Node, Mapped] = field(init=False, default_factory=dict)
    gains: dict[fx.Node, fx.Node] = field(init=False, default_factory=dict)
    size: int = field(init=False, default=0)

    def propagate(self, seeds: Mapping[fx.Node, Tensor]) -> None:
        self.size = 1 + max(int(layout.max()) for layout in seeds.values())
        super().propagate(seeds)

    # --- what the kind of map decides -------------------------------------------------------------

    @abstractmethod
    def normalized(self, norm: NormCall, value: fx.Node) -> Mapping[fx.Node, Tensor]:
        """As `forced`, where `value` is the input or the output of a normalization."""

    @abstractmethod
    def taken(self, node: fx.Node, value: fx.Node) -> Mapping[fx.Node, Tensor]:
        """As `forced`, where the weighted operator `node` takes `value`."""

    def check_other_use(self, node: fx.Node, user: fx.Node) -> None:
        """Raise Unsupported where `user` may not read the weight of `node` otherwise than that."""
        raise Unsupported(f"the weight of {self.name_of(node)} is also used elsewhere")

    def unlisted(self, node: fx.Node, value: fx.Node) -> Mapping[fx.Node, Tensor]:
        """As `forced`, where `node` is none of the operators that every such map passes."""
        raise self.stopped(node, value)

    @abstractmethod
    def added(self, node: fx.Node) -> None:
        """The operator `node` adds the same number, or bias, to all channels of a position."""

    @abstractmethod
    def check_whole(self, value: fx.Node, layout: Tensor) -> None:
        """Raise Unsupported unless the map can act on a value with this layout."""

    # --- operators --------------------------------------------------------------------------------

    def forced(self, node: fx.Node, value: fx.Node) -> Mapping[fx.Node, Tensor]:
        forced = self._passed(node, value)
        for other, layout in forced.items():
            if bool((layout != NONE).any()):
                self.check_whole(other, layout)
        return forced

    def _passed(self, node: fx.Node, value: fx.Node) -> Mapping[fx.Node, Tensor]:
        if node in self.norm_calls or not _keeps_apart(node):
            layout = at_every_position(self.known[value])
            if not torch.equal(layout, self.known[value]):
                return {value: layout}
        row, call = operator_of(node), self.norm_calls.get(node)
        if row is not None and row.fills == 0:  # M 0 = 0
            return {}
        if call is None and is_a(node, "normalization"):
            call = self._operator(node)
        if call is not None:
            return self.normalized(call, value)
        if is_tensor(node) and self.context.constant(node) is not None:
            return self._constant(node)
        rule = rule_of(node)
        if rule is None:
            return self.unlisted(node, value)
        if isinstance(rule, Product):
            return self._multiplied(node, value, rule)
        if is_a(node, "embedding") and node is value:
            return self._produced(node, Mapped(argument(node, "weight"), None, 1, reads=(node,)))
        if is_a(node, *WEIGHTED):
            return self._mixed(node, value) or self._weighted(node, value)
        try:
            if is_a(node, "pick", "scatter") and is_computed(node, self.context):
                forced = dict(rule.propagate(node, self.known, self.context))
                rule.constraints(node, {**self.known, **forced}, self.context)
                return forced
            if isinstance(rule, Moving):
                return moved_positions(node, self.known, self.context, whole=self.whole_values)
            if isinstance(rule, Same) and is_cast(node):
                return rule.propagate(node, self.known, self.context)
            if isinstance(rule, (Same, Sum)) or (isinstance(rule, Window) and not rule.positive):
                forced = dict(rule.propagate(node, self.known, self.context))
                constraints = rule.constraints(node, {**self.known, **forced}, self.context)
                if any(equation.added for equation in constraints.equations):
                    self.added(node)
                return forced
        except Unsupported as reason:
            raise Unsupported(f"{reason} ({self.name_of(node)})") from reason
        return self.unlisted(node, value)

    def _operator(self, node: fx.Node) -> NormCall | None:
        """The call of a normalization over the channels, by an operator of torch."""
        row, value = operator_of(node), node.args[0]
        assert row is not None and isinstance(value, fx.Node)
        if row.normalizes not in ("layer", "rms") or len(argument(node, "normalized_shape")) != 1:
            return None
        return NormCall(value, node, frozenset([node]), -1, row.normalizes)

    def _multiplied(self, node: fx.Node, value: fx.Node, rule: Product) -> dict[fx.Node, Tensor]:
        rank = len(shape_of(node))
        layout = self.known[value]
        layout = layout.view(*[1] * (rank - layout.dim()), *layout.shape)
        factors = [each for each in node.args[:2] if isinstance(each, fx.Node)]  # a square has two
        carrying = [each for each in factors if _varies(each, rank, channel_axes(layout))]
        gain = rule.constant(node, self.context)
        if gain in carrying and len(carrying) == 2:
            if prod(shape_of(gain)) != layout.numel() or bool(blocks_of(layout.flatten()).any()):
                raise Unsupported(f"the gain of {self.name_of(node)} is none per channel")
            carrying.remove(gain)
            self._takes_gain(node, carrying[0], layout)
        if len(carrying) != 1 or carrying[0] not in rule.numerators(node):
            raise self.stopped(node, value)
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
        """A matrix product over positions: M (x W) = (M x) W.

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
                raise self.stopped(node, value)
            if is_a(node, "linear") and argument(node, "bias") is not None:
                self.added(node)
            return {node: layout, left: layout}
        if value is not left and layout.shape[-1] > 1 and not is_a(node, "linear"):
            if left in self.known or self.context.constant(right) is not None:
                return {}
            rank = len(shape_of(node))
            out = along(rank, rank - 1, layout.flatten())
            return {node: out, right: of_operand(out, shape_of(right))}
        return {}

    def _weighted(self, node: fx.Node, value: fx.Node) -> Mapping[fx.Node, Tensor]:
        if value is not node:
            return self.taken(node, value)
        return self._produced(node, self.placed(node, value))

    def placed(self, node: fx.Node, value: fx.Node) -> Mapped:
        """Where the channels of `value` lie in the weight of `node`, which computes or takes it.

        Raises:
            Unsupported: they lie in none.
        """
        rule, own = rule_of(node), {value: self.known[value]}
        assert rule is not None
        try:
            computed = rule.propagate(node, own, self.context)  # a weight would change with it
            foldings = [] if computed else rule.constraints(node, own, self.context).foldings
        except Unsupported as reason:
            raise Unsupported(f"{reason} ({self.name_of(node)})") from reason
        if computed:
            raise self.stopped(node, value)
        (each,) = foldings
        if has_argument(node, "groups") and int(argument(node, "groups")) > 1:
            raise Unsupported(f"the groups of {self.name_of(node)} do not mix")
        index = each.channel_index
        (axis,) = (axis for axis, size in enumerate(index.shape) if size > 1)
        channels = range(index.shape[axis]) if index.channels is None else index.channels
        starts = _starts(tuple(channels), self.size)
        if starts is None:
            raise Unsupported(f"the weight of {self.name_of(node)} has its channels in no order")
        return Mapped(each.weight, each.bias, axis, starts, each.reads)

    def _constant(self, value: fx.Node) -> dict[fx.Node, Tensor]:
        layout = self.known[value]
        axes = channel_axes(layout)
        if len(axes) > 1:
            raise Unsupported(f"the channels of {self.name_of(value)} lie along several axes")
        starts = _starts(tuple(layout.flatten().tolist()), self.size)
        if starts is None:
            raise Unsupported(f"{self.name_of(value)} has its channels in no order")
        self.producers[value] = Mapped(value, None, axes[0], starts, tuple(value.users))
        return {}

    def _produced(self, node: fx.Node, mapped: Mapped) -> dict[fx.Node, Tensor]:
        """`node` is mapped by a weight, and so is all else that is computed with it."""
        layout, forced = self.known[node], {}
        from_the_end = channel_axes(layout)[0] - layout.dim()
        for user in mapped.weight.users:
            if user.target is node.target:
                rank = len(shape_of(user))
                forced[user] = along(rank, rank + from_the_end, layout.flatten())
            else:
                self.check_other_use(node, user)
        self.producers[node] = mapped
        return forced

    def stopped(self, node: fx.Node, value: fx.Node) -> Unsupported:
        """Why `node` cannot compute, or take, a `value` that changes."""
        if node is value:
            return Unsupported(f"its input comes from {self.name_of(value)}")
        return Unsupported(f"{self.name_of(value)} is also used by {self.name_of(node)}")


def _keeps_apart(node: fx.Node) -> bool:
    """Whether some positions can change at an operator beside others that stay as they are."""
    rule = rule_of(node)
    scales = isinstance(rule, Product) and len(operands(node)) == 1  # by a number
    return scales or isinstance(rule, (Moving, Same))


def _starts(channels: tuple[int, ...], size: int) -> tuple[int, ...] | None:
    """Where each block 0, 1, ..., size - 1 begins among `channels`; None for another order."""
    starts = tuple(start for start, channel in enumerate(channels) if channel == 0)
    inside = {start + channel: channel for start in starts for channel in range(size)}
    placed = {at: channel for at, channel in enumerate(channels) if channel != NONE}
    return starts if inside == placed else None


def _in_order(layout: Tensor) -> Tensor:
    return torch.arange(layout.numel()).view(layout.shape)


def _varies(factor: fx.Node, rank: int, axes: tuple[int, ...]) -> bool:
    """Whether a factor of a product of `rank` axes varies along any of `axes`."""
    shape = (1,) * (rank - len(shape_of(factor))) + shape_of(factor)
    return any(shape[axis] > 1 for axis in axes)
