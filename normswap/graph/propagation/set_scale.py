"""What travels: one positive number for each set of elements that has statistics of its own.

An RMSNorm gives y = s x with one number s > 0 for each position. Where it is taken away, what it
gave is multiplied by another such number, y' = c y, and so is what follows, until a normalization
over a set of elements with one and the same c divides it out, up to its eps. An operator

1. gives its output the numbers of its input, where it moves elements, is positively homogeneous
   (ReLU, LeakyReLU, PReLU), or multiplies and divides by what does not change;
2. adds values that have the same numbers;
3. adds up elements that have one number: Linears, convolutions and matrix products over channels,
   means and maxima, none of them with a bias;
4. ends them, if it is a normalization by the statistics of such elements;
5. stops them otherwise: what it gives is not f(c y) = c f(y).

The layout of a value (`graph.operators.layout`) says which number each element has, `NONE` for 1.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, fx

from normswap.core.errors import Unsupported
from normswap.graph.index import Index
from normswap.graph.operators import is_a, operator_of
from normswap.graph.operators.functions import Homogeneous
from normswap.graph.operators.layout import NONE, equal
from normswap.graph.operators.moving import Moving
from normswap.graph.operators.normalizations import sets_of
from normswap.graph.operators.operator import reads_numbers
from normswap.graph.operators.pointwise import Product, Same, Sum, is_cast
from normswap.graph.operators.rule import Context, argument, is_tensor, mutates, operands, shape_of
from normswap.graph.operators.weights import is_transposed, pads
from normswap.graph.operators.windows import Window
from normswap.graph.sites import describe


@dataclass(frozen=True)
class SampleNorm:
    """A call of a normalization by statistics of the sample that is more than one operator.

    Attributes:
        input: what it normalizes.
        nodes: all that ran inside.
        over: the axes of the input that each set of elements goes along.
    """

    input: fx.Node
    nodes: frozenset[fx.Node]
    over: tuple[int, ...]


class SetScale:
    """The values of a captured model that change with some others, each set by a number of its own.

    Args:
        index: of the model.
        context: what the rules ask.
        norms: the calls of normalizations that are more than one operator, by every node in them.

    Attributes:
        known: the layout of each value that changes.
        ends: the operators of normalizations that end the numbers, in order of execution.
    """

    def __init__(self, index: Index, context: Context, norms: Mapping[fx.Node, SampleNorm]) -> None:
        self._index, self._context, self._norms = index, context, norms
        self.known: dict[fx.Node, Tensor] = {}
        self.ends: list[fx.Node] = []

    def follow(self, seeds: Mapping[fx.Node, Tensor]) -> None:
        """Follow the numbers of `seeds`, values with their layouts, to where they end.

        Raises:
            Unsupported: an operator stops them.
        """
        self.known |= seeds
        waiting = {node for value in seeds for node in _readers(value)}
        while waiting:  # in order of execution, so that all that an operator takes is known
            node = min(waiting, key=self._index.position_of.__getitem__)
            waiting.remove(node)
            layout = self._after(node)
            if layout is not None and bool((layout != NONE).any()):
                self.known[node] = layout
                waiting.update(_readers(node))

    # --- operators --------------------------------------------------------------------------------

    def _after(self, node: fx.Node) -> Tensor | None:
        """The layout of what `node` computes; None where the numbers end."""
        carried = {value: self.known[value] for value in _taken(node) if value in self.known}
        norm = self._norms.get(node)
        if norm is not None and carried.keys() == {norm.input}:
            self._end(node, _along(carried[norm.input], norm.over))
            return None
        if node.op == "output":
            raise Unsupported("the model returns it")
        if not is_tensor(node):
            raise self._stopped(node)
        if is_a(node, "normalization") and carried.keys() == {node.args[0]}:
            (layout,) = carried.values()
            sets = sets_of(node, layout)
            if sets is None:
                raise self._stopped(node)
            self._end(node, sets)
            return None
        try:
            layout = self._passed(node, carried)
        except Unsupported as reason:
            raise Unsupported(f"{reason} ({self._name_of(node)})") from reason
        self._check_written(node, layout)
        return layout

    def _end(self, node: fx.Node, sets: Tensor) -> None:
        if not bool((sets == sets[..., :1]).all()):
            name = self._name_of(node)
            raise Unsupported(f"{name} takes statistics over elements with several numbers")
        self.ends.append(node)

    def _passed(self, node: fx.Node, carried: Mapping[fx.Node, Tensor]) -> Tensor:
        row, context = operator_of(node), self._context
        rule = None if row is None else row.rule
        if isinstance(rule, Moving):
            return rule.propagate(node, carried, context)[node]
        if isinstance(rule, Sum):
            return self._added(node, rule, carried)
        if len(carried) > 1:
            raise self._stopped(node)
        ((value, layout),) = carried.items()
        if row is not None and isinstance(row.scale_rule, Homogeneous) and value is node.args[0]:
            return layout
        if type(rule) is Same:
            if not is_cast(node):
                rule.constraints(node, {value: layout, node: layout}, context)
            return layout
        if isinstance(rule, Product) and value in rule.numerators(node):
            if node.args[0] is node.args[1]:
                raise self._stopped(node)
            return _aligned(layout, node)
        if isinstance(rule, Window):
            return rule.propagate(node, carried, context)[node]
        if is_a(node, "linear") and value is node.args[0]:
            return self._mixed(node, layout, -1)
        if is_a(node, "convolution", "transposed convolution") and value is node.args[0]:
            return self._convolved(node, layout)
        if is_a(node, "matmul", "contraction") and rule is not None:
            found = rule.propagate(node, carried, context)
            if node in found:
                return found[node]
        raise self._stopped(node)

    def _added(self, node: fx.Node, rule: Sum, carried: Mapping[fx.Node, Tensor]) -> Tensor:
        layouts = []
        for value, factor in rule.terms(node):
            if value in carried:
                layouts.append(_aligned(carried[value], node))
            elif isinstance(value, fx.Node) or value * factor:
                raise Unsupported("something is added that does not change with it")
        if not all(equal(layouts[0], other) for other in layouts[1:]):
            raise Unsupported("values with other numbers are added")
        return layouts[0]

    def _convolved(self, node: fx.Node, layout: Tensor) -> Tensor:
        kernel = shape_of(argument(node, "weight"))[2:]
        channels = layout.dim() - len(kernel) - 1
        if any(size > 1 for size in layout.shape[channels + 1 :]):
            stride = argument(node, "stride")
            strides = {stride} if isinstance(stride, int) else set(stride)
            if {*kernel, *strides} != {1} or pads(node) or is_transposed(node):
                raise Unsupported("positions are mixed")
        return self._mixed(node, layout, channels)

    def _mixed(self, node: fx.Node, layout: Tensor, axis: int) -> Tensor:
        """The layout of a sum of products over the channels, which lie along `axis`."""
        if argument(node, "bias") is not None:
            raise Unsupported("a bias is added")
        if layout.shape[axis] > 1:
            raise Unsupported("elements with several numbers are added up")
        return layout

    def _check_written(self, node: fx.Node, layout: Tensor) -> None:
        """Raise Unsupported where `node` writes into a value that has not the same numbers."""
        written = mutates(node)
        if written is None:
            return
        before = self.known.get(written)
        if before is None or not equal(_aligned(before, node), layout):
            raise Unsupported(f"{self._name_of(node)} writes it into another value")

    def _stopped(self, node: fx.Node) -> Unsupported:
        return Unsupported(f"{self._name_of(node)} takes it")

    def _name_of(self, node: fx.Node) -> str:
        return describe(node, self._index.region_of[node])


def _readers(value: fx.Node) -> Iterator[fx.Node]:
    """The operators that read the numbers of `value`."""
    for user in value.users:
        if not reads_numbers(user, value):
            continue
        if is_a(user, "split"):
            yield from user.users
        else:
            yield user


def _taken(node: fx.Node) -> list[fx.Node]:
    """The values that `node` takes; those of the call of which it takes one output."""
    source = node.args[0] if node.args else None
    if isinstance(source, fx.Node) and is_a(source, "split"):
        node = source
    return operands(node)


def _aligned(layout: Tensor, node: fx.Node) -> Tensor:
    """The layout of an operand, seen from the output it is broadcast to."""
    return layout.view(*[1] * (len(shape_of(node)) - layout.dim()), *layout.shape)


def _along(layout: Tensor, over: tuple[int, ...]) -> Tensor:
    """A layout whose axes `over` are the last one."""
    rest = [axis for axis in range(layout.dim()) if axis not in over]
    return layout.permute(*rest, *over).flatten(len(rest))
