"""What each rule says of an operator is so: checked with the operator itself, in float64.

The judge (`normswap.graph.operators.judge`) changes all that a rule says changes, and runs the
operator again. The calls are drawn (`rule_cases`).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_cases import CASES, RULES, Case, Constant, Value, cases
from torch import Tensor, fx

from normswap.core.errors import Unsupported
from normswap.graph.operators.judge import Judge
from normswap.graph.operators.layout import NONE, along

EACH = pytest.mark.parametrize("target", list(RULES), ids=str)
CHANNELS = 512  # more than any value here has elements
Shifts = dict[fx.Node, Tensor]
few = settings(max_examples=8, deadline=None, derandomize=True)


class Drawn(Judge):
    """A case as a graph of one operator, with numbers, and its rule's judge."""

    def __init__(self, case: Case, *, through: bool = False) -> None:
        torch.manual_seed(0)
        self.case, graph = case, fx.Graph()
        self.nodes: dict[Value | Constant, fx.Node] = {}
        tensors: dict[fx.Node, Tensor] = {}
        for index, leaf in enumerate(case.leaves()):
            placed = graph.placeholder(f"leaf{index}")
            placed.meta["val"] = leaf.sample() if isinstance(leaf, Value) else leaf.tensor
            self.nodes[leaf], tensors[placed] = placed, placed.meta["val"]
        args, kwargs = case.fill(self.nodes.__getitem__)
        if case.inner is None:
            node = graph.call_function(case.target, args, kwargs)
        else:
            call = graph.call_function(case.inner, args[:-1], kwargs)
            node = graph.call_function(case.target, (call, args[-1]))

        def run(tensors: dict[fx.Node, Tensor]) -> Tensor:
            output = case.run(lambda leaf: tensors[self.nodes[leaf]].clone())
            assert isinstance(output, Tensor)
            return output

        node.meta["val"] = run(tensors)
        constants = {n: leaf.tensor for leaf, n in self.nodes.items() if isinstance(leaf, Constant)}
        super().__init__(node, RULES[case.target], run, tensors, constants, through=through)

    @property
    def first(self) -> fx.Node | None:
        """The first value."""
        values = [node for leaf, node in self.nodes.items() if isinstance(leaf, Value)]
        return values[0] if values else None


def assert_holds(drawn: Drawn, known: dict[fx.Node, Tensor]) -> bool:
    """The rule is right about `known`; whether a shift passes."""
    deviation, shifted = drawn.deviation(known)
    assert deviation <= 1e-10
    return shifted


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
def test_downstream_an_operator_computes_what_its_rule_says(
    target: Any, data: st.DataObject
) -> None:
    drawn = Drawn(data.draw(cases(target)))
    if drawn.first is None:
        return
    (leaf,) = (leaf for leaf, node in drawn.nodes.items() if node is drawn.first)
    assert isinstance(leaf, Value)
    layout = draw_layout(data, drawn, drawn.first, leaf.axis)
    try:
        known = drawn.propagate({drawn.first: layout})
        assert_holds(drawn, known)
    except Unsupported:
        # It may refuse an odd layout, but not that of a BatchNorm.
        if drawn.case.downstream and drawn.case.shift:
            size = leaf.shape[leaf.axis]
            known = drawn.propagate(
                {drawn.first: along(len(leaf.shape), leaf.axis, torch.arange(size))}
            )
            assert_holds(drawn, known)


@EACH
@few
@given(data=st.data())
def test_upstream_an_operator_computes_what_its_rule_says(target: Any, data: st.DataObject) -> None:
    drawn = Drawn(data.draw(cases(target)))
    shape = tuple(drawn.node.meta["val"].shape)
    if not shape:
        layout = torch.zeros((), dtype=torch.int64)
    else:
        size = shape[drawn.case.out_axis]
        layout = along(len(shape), drawn.case.out_axis, torch.arange(size))
    try:
        known = drawn.propagate({drawn.node: layout})
        shifted = assert_holds(drawn, known)
    except Unsupported:
        assert not drawn.case.upstream
        return
    if drawn.case.upstream:
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
        known = drawn.propagate({drawn.first: layout})
        if drawn.node not in known:
            return  # it is folded, or nothing of it arrives
        back = drawn.propagate({drawn.node: known[drawn.node]})
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
        known = drawn.propagate({value: channels.view(sizes)})
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
