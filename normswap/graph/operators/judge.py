"""Whether a rule is right about a call of its operator: the operator itself is the judge.

Every value that the rule says changes is changed as its layout says, v' = s[c] v + m t[c] with
random s and t. Every constant that the change is folded into is changed as its channel index says.
Then the operator runs again: its output must be the original one, changed as its own layout says.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from normswap.core.compat import pytree
from normswap.core.errors import Unsupported
from normswap.graph.operators.layout import NONE, equal, joined
from normswap.graph.operators.rule import (
    ChannelIndex,
    Constraints,
    Context,
    Equation,
    Folding,
    Rule,
)

CHANNELS = 512  # more than any value of a small call has elements
Tensors = dict[fx.Node, Tensor]
Layouts = dict[fx.Node, Tensor]


class Judge:
    """Judges a rule on one call.

    Args:
        node: the call; `meta["val"]` of all nodes holds a tensor.
        run: the output of the operator for other tensors.
        tensors: the numbers of all that the operator is given, in float64.
        constants: those of them that are parameters or buffers.
        through: a shift passes products with a constant.
    """

    def __init__(
        self,
        node: fx.Node,
        rule: Rule,
        run: Callable[[Tensors], Tensor],
        tensors: Tensors,
        constants: Mapping[fx.Node, Tensor],
        *,
        through: bool = False,
    ) -> None:
        self.node, self.run, self.tensors = node, run, tensors
        self._rule = rule
        numbers = {each: t for each, t in constants.items() if t.is_floating_point()}
        self._context = Context(
            False,
            constants.get,
            literal=lambda _: True,
            numbers=numbers.get,
            channels=CHANNELS,
            through=through,
        )

    def propagate(self, known: Layouts) -> Layouts:
        """`known` and all that follows from it.

        Raises:
            Unsupported: the rule refuses it.
        """
        while True:
            found = dict(known)
            for value, layout in self._rule.propagate(self.node, known, self._context).items():
                found[value] = joined(found[value], layout) if value in found else layout
            found = {value: layout for value, layout in found.items() if (layout != NONE).any()}
            if found.keys() == known.keys() and all(equal(found[v], known[v]) for v in known):
                return known
            known = found

    def deviation(self, known: Layouts) -> tuple[float, bool]:
        """How far the output is from what the rule says, and whether a shift passes.

        That is max |a - b| over the larger of 1 and max |b|; `known` as `spread` gives it.

        Raises:
            Unsupported: the rule refuses it.
        """
        constraints = self._rule.constraints(self.node, known, self._context)
        shifts, offsets = (_multiplicities(constraints, list(known), times) for times in (0, 1))
        for each in constraints.foldings:
            if each.bias is None:
                shifts[each.value] = offsets[each.value] = torch.zeros(CHANNELS).double()
        affine = _RandomAffine(positive=bool(constraints.positive))
        total = {v: shifts[v] * affine.shift + offsets[v] * (affine.scale - 1) for v in known}
        tensors = dict(self.tensors)
        for value, layout in known.items():
            if value is not self.node:
                scale, shift = affine.at(layout, total[value])
                tensors[value] = tensors[value] * scale + shift
        for each in constraints.foldings:
            affine.fold(each, total[each.value], tensors)
        expected = self.run(self.tensors)
        if self.node in known:
            scale, shift = affine.at(known[self.node], total[self.node])
            expected = expected * scale + shift
        error = (self.run(tensors) - expected).abs().max() / expected.abs().max().clamp_min(1.0)
        return float(error), any(bool((times.abs() > 1e-9).any()) for times in shifts.values())


def _multiplicities(
    constraints: Constraints, values: list[fx.Node], times: float
) -> dict[fx.Node, Tensor]:
    """Random ones of each channel that obey the equations; all 0 where nothing else does.

    Args:
        times: 1 for offsets, 0 for shifts, to which no number is added.

    Raises:
        Unsupported: none obey them.
    """
    equations: list[Equation] = constraints.equations
    matrix = torch.zeros(len(equations), len(values), CHANNELS, dtype=torch.float64)
    right = torch.tensor([-times * each.added for each in equations], dtype=torch.float64)
    for row, equation in zip(matrix, equations, strict=True):
        for value, factor in equation.terms.items():
            if value in values:
                row[values.index(value)] += factor
    if bool((matrix == matrix[..., :1]).all()):
        matrix = matrix[..., :1]  # most often all channels have the same
    matrix = matrix.permute(2, 0, 1)
    free = torch.rand(len(values), dtype=torch.float64) + 0.5
    numbers = free - torch.einsum("cve,ce->cv", torch.linalg.pinv(matrix), matrix @ free - right)
    if (torch.einsum("cev,cv->ce", matrix, numbers) - right).abs().gt(1e-9).any():
        raise Unsupported("the number has no place")
    numbers = numbers.where(numbers.abs() > 1e-9, 0).expand(CHANNELS, -1)
    return dict(zip(values, numbers.T, strict=True))


class _RandomAffine:
    """Random scales and shifts of channels."""

    def __init__(self, *, positive: bool) -> None:
        self.scale = torch.rand(CHANNELS, dtype=torch.float64) + 0.5
        if not positive:
            self.scale *= torch.randint(0, 2, (CHANNELS,)) * 2 - 1
        self.shift = torch.randn(CHANNELS, dtype=torch.float64)

    def at(self, channels: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift of each of `channels`, 1 and 0 where there is none."""
        none = channels == NONE
        return self.scale[channels].masked_fill(none, 1), total[channels].masked_fill(none, 0)

    def _in_slots(self, channel_index: ChannelIndex, total: Tensor) -> tuple[Tensor, Tensor]:
        size = torch.Size(channel_index.shape).numel()
        channels = (
            torch.arange(size)
            if channel_index.channels is None
            else torch.tensor(channel_index.channels)
        )
        scale, shift = self.at(channels, total)
        return scale.view(channel_index.shape), shift.view(channel_index.shape)

    def fold(self, each: Folding, total: Tensor, tensors: Tensors) -> None:
        """Change the weight and bias as the table says of its two sides."""
        weight = tensors[each.weight]
        scale, shift = self._in_slots(each.channel_index, total)
        seen = weight.view(each.channel_index.view or weight.shape)
        if each.side == "out":
            tensors[each.weight] = (seen * scale).view(weight.shape)
            if each.bias is not None:
                assert each.bias_index is not None
                scale, shift = self._in_slots(each.bias_index, total)
                tensors[each.bias] = tensors[each.bias] * scale + shift
            return
        # The input has taken the affine, so the weight takes it back.
        tensors[each.weight] = (seen / scale).view(weight.shape)
        if each.bias is not None:
            added = (seen / scale * shift).sum(each.channel_index.over)
            tensors[each.bias] = tensors[each.bias] - added.flatten()


def call_of(
    target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[fx.Node, Callable[[Tensors], Tensor], Tensors]:
    """A graph of one call, what runs it, and the tensors that it is given."""
    graph, tensors = fx.Graph(), Tensors()

    def placed(value: Tensor) -> fx.Node:
        node = graph.placeholder(f"leaf{len(tensors)}")
        node.meta["val"] = tensors[node] = value
        return node

    given = pytree.tree_map_only(Tensor, placed, (args, dict(kwargs)))
    node = graph.call_function(target, *given)

    def run(numbers: Tensors) -> Tensor:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: numbers[each].clone())
        output = target(*args, **kwargs)
        assert isinstance(output, Tensor)
        return output

    node.meta["val"] = run(tensors)
    return node, run, tensors
