"""What each rule says of an operator is so: checked with the operator itself, in float64.

Every value that a rule says changes is changed as its layout says, v' = s[c] v + m t[c] with random
s and t, every constant that absorbs is changed as its slots say, and torch computes the operator
again: its output must be the original one, changed as its own layout says.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_cases import CASES, Case, Constant, Value, cases
from torch import Tensor, fx

from normswap.graph.affine.layout import NONE, along, equal, joined
from normswap.graph.affine.rules import RULES
from normswap.graph.affine.rules.rule import Absorbing, Context, Settled, Slots
from normswap.graph.norm_modules import Unsupported

EACH = pytest.mark.parametrize("target", list(RULES), ids=str)
CHANNELS = 512  # more than any value here has elements
Shifts = dict[fx.Node, Tensor]
few = settings(max_examples=8, deadline=None, derandomize=True)


class Drawn:
    """A case as a graph of one operator, with numbers."""

    def __init__(self, case: Case, *, through: bool = False) -> None:
        torch.manual_seed(0)
        self.case, graph = case, fx.Graph()
        self.nodes: dict[Value | Constant, fx.Node] = {}
        self.tensors: dict[fx.Node, Tensor] = {}
        for index, leaf in enumerate(case.leaves()):
            node = graph.placeholder(f"leaf{index}")
            node.meta["val"] = leaf.sample() if isinstance(leaf, Value) else leaf.tensor
            self.nodes[leaf], self.tensors[node] = node, node.meta["val"]
        args, kwargs = case.fill(self.nodes.__getitem__)
        if case.inner is None:
            self.node = graph.call_function(case.target, args, kwargs)
        else:
            call = graph.call_function(case.inner, args[:-1], kwargs)
            self.node = graph.call_function(case.target, (call, args[-1]))
        self.node.meta["val"] = self.run(self.tensors)
        constants = {n: leaf.tensor for leaf, n in self.nodes.items() if isinstance(leaf, Constant)}
        numbers = {n: t for n, t in constants.items() if t.is_floating_point()}
        self.context = Context(
            False,
            constants.get,
            literal=lambda node: True,
            numbers=numbers.get,
            channels=CHANNELS,
            through=through,
        )

    @property
    def first(self) -> fx.Node | None:
        """The first value."""
        values = [node for leaf, node in self.nodes.items() if isinstance(leaf, Value)]
        return values[0] if values else None

    def run(self, tensors: dict[fx.Node, Tensor]) -> Tensor:
        """The output of the operator for other inputs."""
        output = self.case.run(lambda leaf: tensors[self.nodes[leaf]].clone())
        assert isinstance(output, Tensor)
        return output

    def spread(self, known: dict[fx.Node, Tensor]) -> dict[fx.Node, Tensor]:
        """`known` and all that follows from it."""
        while True:
            found = dict(known)
            for value, layout in (
                RULES[self.case.target].spread(self.node, known, self.context).items()
            ):
                found[value] = joined(found[value], layout) if value in found else layout
            found = {value: layout for value, layout in found.items() if (layout != NONE).any()}
            if found.keys() == known.keys() and all(equal(found[v], known[v]) for v in known):
                return known
            known = found

    def settle(self, known: dict[fx.Node, Tensor]) -> Settled:
        return RULES[self.case.target].settle(self.node, known, self.context)


def multiplicities(settled: Settled, known: dict[fx.Node, Tensor], times: float) -> Shifts:
    """Random ones of each channel that obey the equations; all 0 where nothing else does.

    Args:
        times: 1 for offsets, 0 for shifts, to which no number is added.

    Raises:
        Unsupported: none obey them.
    """
    values, equations = list(known), settled.equations
    matrix = torch.zeros(len(equations), len(values), CHANNELS, dtype=torch.float64)
    right = torch.tensor([-times * each.added for each in equations], dtype=torch.float64)
    for row, equation in zip(matrix, equations, strict=True):
        for value, factor in equation.terms.items():
            if value in known:
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


class Affine:
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

    def in_slots(self, slots: Slots, total: Tensor) -> tuple[Tensor, Tensor]:
        size = torch.Size(slots.shape).numel()
        channels = torch.arange(size) if slots.channels is None else torch.tensor(slots.channels)
        scale, shift = self.at(channels, total)
        return scale.view(slots.shape), shift.view(slots.shape)

    def absorb(self, each: Absorbing, total: Tensor, tensors: dict[fx.Node, Tensor]) -> None:
        """Change the weight and bias as the table says of its two sides."""
        weight = tensors[each.weight]
        scale, shift = self.in_slots(each.slots, total)
        seen = weight.view(each.slots.view or weight.shape)
        if each.side == "out":
            tensors[each.weight] = (seen * scale).view(weight.shape)
            if each.bias is not None:
                assert each.bias_slots is not None
                scale, shift = self.in_slots(each.bias_slots, total)
                tensors[each.bias] = tensors[each.bias] * scale + shift
            return
        # The input has taken the affine, so the weight takes it back.
        tensors[each.weight] = (seen / scale).view(weight.shape)
        if each.bias is not None:
            added = (seen / scale * shift).sum(each.slots.over)
            tensors[each.bias] = tensors[each.bias] - added.flatten()


def assert_holds(drawn: Drawn, known: dict[fx.Node, Tensor]) -> bool:
    """The rule is right about `known`; whether a shift passes."""
    settled = drawn.settle(known)
    shifts, offsets = (multiplicities(settled, known, times) for times in (0, 1))
    for each in settled.absorbing:
        if each.bias is None:
            shifts[each.value] = offsets[each.value] = torch.zeros(CHANNELS, dtype=torch.float64)
    affine = Affine(positive=bool(settled.positive))
    total = {v: shifts[v] * affine.shift + offsets[v] * (affine.scale - 1) for v in known}
    tensors = dict(drawn.tensors)
    for value, layout in known.items():
        if value is not drawn.node:
            scale, shift = affine.at(layout, total[value])
            tensors[value] = tensors[value] * scale + shift
    for each in settled.absorbing:
        affine.absorb(each, total[each.value], tensors)
    expected = drawn.run(drawn.tensors)
    if drawn.node in known:
        scale, shift = affine.at(known[drawn.node], total[drawn.node])
        expected = expected * scale + shift
    torch.testing.assert_close(drawn.run(tensors), expected, rtol=1e-10, atol=1e-10)
    return any(bool((times.abs() > 1e-9).any()) for times in shifts.values())


def layouts(rank: int, sizes: tuple[int, ...], *, free: bool, axis: int) -> st.SearchStrategy[Any]:
    """A random layout of a value; `free`: one that varies along any axes."""

    def fill(varies: list[bool]) -> st.SearchStrategy[Any]:
        shape = [n if v else 1 for n, v in zip(sizes, varies, strict=True)]
        count = torch.Size(shape).numel()
        numbers = st.lists(st.integers(NONE, 2), min_size=count, max_size=count)
        return numbers.filter(lambda n: max(n) >= 0).map(lambda n: torch.tensor(n).view(shape))

    if not free:
        return fill([index == axis % rank for index in range(rank)])
    return st.lists(st.booleans(), min_size=rank, max_size=rank).flatmap(fill)


def draw_layout(data: st.DataObject, drawn: Drawn, node: fx.Node, axis: int) -> Tensor:
    shape = tuple(node.meta["val"].shape)
    free = type(RULES[drawn.case.target]).__name__ in ("Moving", "Same")
    found = data.draw(layouts(len(shape), shape, free=free, axis=axis))
    assert isinstance(found, Tensor)
    return found


def test_every_rule_has_cases() -> None:
    assert CASES.keys() == RULES.keys()


@EACH
@few
@given(data=st.data())
def test_late_an_operator_computes_what_its_rule_says(target: Any, data: st.DataObject) -> None:
    drawn = Drawn(data.draw(cases(target)))
    if drawn.first is None:
        return
    (leaf,) = (leaf for leaf, node in drawn.nodes.items() if node is drawn.first)
    assert isinstance(leaf, Value)
    layout = draw_layout(data, drawn, drawn.first, leaf.axis)
    try:
        known = drawn.spread({drawn.first: layout})
        assert_holds(drawn, known)
    except Unsupported:
        # It may refuse an odd layout, but not that of a BatchNorm.
        if drawn.case.late and drawn.case.shift:
            size = leaf.shape[leaf.axis]
            known = drawn.spread(
                {drawn.first: along(len(leaf.shape), leaf.axis, torch.arange(size))}
            )
            assert_holds(drawn, known)


@EACH
@few
@given(data=st.data())
def test_early_an_operator_computes_what_its_rule_says(target: Any, data: st.DataObject) -> None:
    drawn = Drawn(data.draw(cases(target)))
    shape = tuple(drawn.node.meta["val"].shape)
    if not shape:
        layout = torch.zeros((), dtype=torch.int64)
    else:
        size = shape[drawn.case.out_axis]
        layout = along(len(shape), drawn.case.out_axis, torch.arange(size))
    try:
        known = drawn.spread({drawn.node: layout})
        shifted = assert_holds(drawn, known)
    except Unsupported:
        assert not drawn.case.early
        return
    if drawn.case.early:
        assert shifted == drawn.case.shift


@EACH
@few
@given(data=st.data())
def test_a_layout_that_went_through_an_operator_comes_back(
    target: Any, data: st.DataObject
) -> None:
    drawn = Drawn(data.draw(cases(target)))
    if drawn.first is None:
        return
    (leaf,) = (leaf for leaf, node in drawn.nodes.items() if node is drawn.first)
    assert isinstance(leaf, Value)
    layout = draw_layout(data, drawn, drawn.first, leaf.axis)
    try:
        known = drawn.spread({drawn.first: layout})
        if drawn.node not in known:
            return  # it is absorbed, or nothing of it arrives
        back = drawn.spread({drawn.node: known[drawn.node]})
    except Unsupported:
        return
    used = survivors(drawn)
    if drawn.first in back:
        came = back[drawn.first].expand(leaf.shape)
    else:
        came = torch.full(leaf.shape, NONE)
    assert torch.equal(came[used], layout.expand(leaf.shape)[used])


@EACH
@few
@given(data=st.data())
def test_whatever_the_layout_a_rule_holds_or_refuses(target: Any, data: st.DataObject) -> None:
    """Of any value, along any axes: it never raises, nor hands on a layout that does not fit."""
    drawn = Drawn(data.draw(cases(target)), through=data.draw(st.booleans()))
    values = [node for leaf, node in drawn.nodes.items() if isinstance(leaf, Value)]
    value = data.draw(st.sampled_from([*values, drawn.node]))
    shape = tuple(value.meta["val"].shape)
    varies = data.draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    sizes = tuple(n if along_it else 1 for n, along_it in zip(shape, varies, strict=True))
    count = torch.Size(sizes).numel()
    channels = data.draw(
        st.sampled_from([torch.arange(count), torch.arange(count) // 2, torch.zeros(count).long()])
    )
    try:
        known = drawn.spread({value: channels.view(sizes)})
        for other, layout in known.items():
            layout.expand(other.meta["val"].shape)
        assert_holds(drawn, known)
    except Unsupported:
        return


def survivors(drawn: Drawn) -> Tensor:
    """Which elements of the first value the output depends on, by torch's own gradient."""
    tensors = dict(drawn.tensors)
    assert drawn.first is not None
    x = tensors[drawn.first].clone().requires_grad_()
    tensors[drawn.first] = x
    return _gradient(drawn.run, tensors, x) != 0


def _gradient(
    run: Callable[[dict[fx.Node, Tensor]], Tensor], tensors: dict[fx.Node, Tensor], x: Tensor
) -> Tensor:
    output = run(tensors)
    if not output.requires_grad:  # detached: it depends on all
        return torch.ones_like(x)
    try:
        (gradient,) = torch.autograd.grad(output.square().sum(), x)
    except RuntimeError as error:  # native_channel_shuffle, which moves every element
        assert "is not implemented" in str(error)
        return torch.ones_like(x)
    return gradient
