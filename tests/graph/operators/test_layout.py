"""Layouts say of each element which channel's affine it carries."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from normswap.core.errors import Unsupported
from normswap.graph.operators.layout import (
    FREE,
    NONE,
    along,
    at_every_position,
    channels_of,
    compressed,
    equal,
    joined,
    of_operand,
)

few = settings(max_examples=30, deadline=None, derandomize=True)


@st.composite
def layouts(draw: st.DrawFn, lowest: int = NONE, shape: tuple[int, ...] = (2, 3, 2)) -> Tensor:
    varies = [draw(st.booleans()) for _ in shape]
    sizes = [n if v else 1 for n, v in zip(shape, varies, strict=True)]
    count = torch.Size(sizes).numel()
    numbers = draw(st.lists(st.integers(lowest, 2), min_size=count, max_size=count))
    return torch.tensor(numbers).view(sizes)


@few
@given(layouts())
def test_compressing_changes_no_element_and_keeps_no_axis_that_does_not_vary(
    layout: Tensor,
) -> None:
    small = compressed(layout)
    assert torch.equal(small.expand(layout.shape), layout)
    for axis, size in enumerate(small.shape):
        constant = bool((layout == layout.narrow(axis, 0, 1)).all())
        assert (size == 1) == (constant or layout.shape[axis] == 1)


@few
@given(layouts(lowest=FREE))
def test_compressing_fills_in_what_nobody_looks_at(layout: Tensor) -> None:
    filled = compressed(layout).expand(layout.shape)
    assert not (filled == FREE).any()
    assert torch.equal(filled[layout != FREE], layout[layout != FREE])


def test_a_value_of_which_every_second_row_is_read_is_one_affine_per_channel() -> None:
    layout = torch.full((1, 3, 4), FREE)
    layout[:, :, ::2] = torch.arange(3).view(1, 3, 1)
    assert torch.equal(compressed(layout), along(3, 1, torch.arange(3)))


@few
@given(layouts(), layouts())
def test_joining_holds_both_or_refuses(first: Tensor, second: Tensor) -> None:
    shape = torch.broadcast_shapes(first.shape, second.shape)
    a, b = first.expand(shape), second.expand(shape)
    if ((a != b) & (a != NONE) & (b != NONE)).any():
        with pytest.raises(Unsupported, match="meet in one"):
            joined(first, second)
        return
    both = joined(first, second).expand(shape)
    assert torch.equal(both[a != NONE], a[a != NONE])
    assert torch.equal(both[b != NONE], b[b != NONE])
    assert (both[(a == NONE) & (b == NONE)] == NONE).all()
    assert equal(joined(first, second), joined(second, first))


@few
@given(layouts(shape=(3, 2)), st.integers(0, 2))
def test_an_operand_has_the_layout_of_what_it_is_broadcast_to(small: Tensor, extra: int) -> None:
    whole = small.view(*[1] * extra, *small.shape)
    assert torch.equal(of_operand(whole, (3, 2)), small)
    for axis, size in enumerate(small.shape):
        if size > 1:
            shape = [3, 2]
            shape[axis] = 1
            with pytest.raises(Unsupported, match="one number for several channels"):
                of_operand(whole, tuple(shape))


def test_the_channels_of_an_axis_are_those_of_its_positions() -> None:
    layout = along(4, 1, torch.tensor([2, 0, NONE]))
    assert channels_of(layout, 1, 3).tolist() == [2, 0, NONE]
    assert channels_of(torch.tensor([[[[1]]]]), 1, 3).tolist() == [1, 1, 1]
    with pytest.raises(Unsupported, match="another axis"):
        channels_of(layout, 2, 5)
    with pytest.raises(Unsupported, match="several axes"):
        channels_of(torch.arange(6).view(2, 3), 1, 3)
    with pytest.raises(Unsupported, match="only a part"):
        channels_of(torch.tensor([[0, 1, 2], [NONE, NONE, NONE]]), 1, 3)


def test_what_acts_on_each_position_alike_changes_all_positions() -> None:
    first = torch.tensor([[0, 1, NONE], [NONE, NONE, NONE]])
    assert at_every_position(first).tolist() == [[0, 1, NONE]]
    assert at_every_position(first.mT).tolist() == [[0], [1], [NONE]]
    several = torch.tensor([[0, 1], [1, NONE]])
    assert torch.equal(at_every_position(several), several)
