"""Sums of parallel branches are found on the graph, and their kernels add up."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from normswap.core.errors import Unsupported
from normswap.graph.branches.sums import BranchSum, find_sums
from normswap.graph.branches.taps import Taps, identity_taps, merged_taps, spread, taps_of
from normswap.graph.capture import capture

CONV = {1: (nn.Conv1d, F.conv1d), 2: (nn.Conv2d, F.conv2d), 3: (nn.Conv3d, F.conv3d)}


def convolve(x: Tensor, kernel: Tensor, taps: Taps, stride: int) -> Tensor:
    function = CONV[x.dim() - 2][1]
    return function(x, kernel, None, stride, taps.padding, taps.dilation, taps.groups)


@st.composite
def same_places(draw: st.DrawFn) -> tuple[int, list[nn.Module], int]:
    """Convs whose outputs have one size, and their stride."""
    axes, channels = draw(st.integers(1, 2)), 8
    excess = draw(st.sampled_from([0, 1]))  # of the span of the kernel over its padding
    convs = []
    for _ in range(draw(st.integers(1, 4))):
        size, dilation = draw(st.integers(1, 5)), draw(st.integers(1, 3))
        padding, odd = divmod(dilation * (size - 1) - excess, 2)
        if odd or padding < 0:
            size, dilation, padding = 1 + excess, 1, 0
        groups = draw(st.sampled_from([1, 2, 4, 8]))
        conv = CONV[axes][0](channels, 8, size, 1, padding, dilation, groups, dtype=torch.float64)
        convs.append(conv)
    return axes, convs, draw(st.integers(1, 3))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(same_places())
def test_one_kernel_computes_the_sum_of_several(
    drawn: tuple[int, list[nn.Module], int],
) -> None:
    axes, convs, stride = drawn
    parts = [taps_of(conv) for conv in convs]
    whole = merged_taps(parts)
    kernel = sum(spread(conv.weight, part, whole) for conv, part in zip(convs, parts, strict=True))
    for size in (12, 13, 14):
        x = torch.randn(2, 8, *[size] * axes, dtype=torch.float64)
        expected = sum(
            convolve(x, conv.weight, part, stride) for conv, part in zip(convs, parts, strict=True)
        )
        torch.testing.assert_close(convolve(x, kernel, whole, stride), expected)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_identity_becomes_a_tap_of_any_grouping(groups: int) -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=groups, dtype=torch.float64)
    identity, whole = identity_taps(2, 8), merged_taps([identity_taps(2, 8), taps_of(conv)])
    kernel = spread(torch.ones(8, 1, 1, 1, dtype=torch.float64), identity, whole)
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    assert whole == taps_of(conv)
    torch.testing.assert_close(convolve(x, kernel, whole, 1), x)


def test_taps_are_no_denser_than_they_must_be() -> None:
    def taps(size: int, dilation: int, padding: int) -> Taps:
        return taps_of(nn.Conv1d(1, 1, size, dilation=dilation, padding=padding))

    assert merged_taps([taps(3, 2, 2), taps(1, 1, 0)]) == taps(3, 2, 2)
    assert merged_taps([taps(3, 2, 2), taps(5, 2, 4)]) == taps(5, 2, 4)
    assert merged_taps([taps(3, 2, 2), taps(3, 1, 1)]) == taps(5, 1, 2)


def test_paddings_may_agree_for_some_sizes_alone() -> None:
    """With stride 2 a padding more or less does not matter where the size is even."""
    convs = [nn.Conv1d(1, 1, 2, bias=False), nn.Conv1d(1, 1, 1, bias=False)]
    parts = [taps_of(conv) for conv in convs]
    whole = merged_taps(parts)
    kernel = sum(spread(c.weight, part, whole) for c, part in zip(convs, parts, strict=True))
    for size in (6, 8):
        x = torch.randn(1, 1, size)
        expected = sum(convolve(x, c.weight, part, 2) for c, part in zip(convs, parts, strict=True))
        torch.testing.assert_close(convolve(x, kernel, whole, 2), expected)


@pytest.mark.parametrize(("size", "dilation"), [(3, 1), (5, 2), (2, 2)])
def test_same_padding_is_as_torch_pads(size: int, dilation: int) -> None:
    conv = nn.Conv1d(2, 2, size, padding="same", dilation=dilation, bias=False)
    x = torch.randn(1, 2, 9)
    torch.testing.assert_close(convolve(x, conv.weight, taps_of(conv), 1), conv(x))


def test_padding_on_one_side_is_refused() -> None:
    with pytest.raises(Unsupported, match="one side"):
        taps_of(nn.Conv1d(1, 1, 2, padding="same"))


class Nested(nn.Module):
    """x + scale * (2 * conv(x) - bn(x)) - conv(relu(x)): the last is of another value."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * (2 * self.conv(x) - self.bn(x)) - self.other(F.relu(x))


class Plain(nn.Module):
    """A residual block: its branches are linear in different values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


def sums(model: nn.Module) -> list[BranchSum]:
    return find_sums(capture(model, torch.randn(2, 4, 6, 6)))


def test_largest_part_that_is_linear_in_one_value_is_found() -> None:
    (found,) = sums(Nested())
    assert [leaf.kind for leaf in found.value.leaves()] == ["source", "weighted", "source"]
    assert found.value.source is not None and found.value.source.op == "placeholder"


def test_sum_of_different_values_is_none() -> None:
    assert sums(Plain()) == []


def test_value_with_two_uses_is_not_looked_into() -> None:
    class Shown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.other = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            seen = self.conv(x)
            return seen + self.other(x), seen

    assert sums(Shown()) == []


def test_batch_statistics_are_not_linear() -> None:
    class Batch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + self.bn(x)

    assert sums(Batch()) == []


@pytest.mark.parametrize("written", [True, False])
def test_buffer_that_changes_is_no_constant(written: bool) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)
            self.register_buffer("scale", torch.rand(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            if written:
                self.scale[0].add_(1)
            return x + self.scale * self.conv(x)

    assert len(sums(Counting())) == (not written)


def test_random_scale_is_no_constant() -> None:
    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.scale = nn.Conv2d(4, 4, 1), nn.Parameter(torch.rand(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(self.scale) * self.conv(x)

    assert sums(Random()) == []


def test_complex_numbers_are_not_looked_into() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            turned = torch.complex(self.conv(x), x) * 1j
            return turned.real + turned.imag

    assert sums(Turned()) == []


def test_a_network_may_be_deeper_than_python_recurses() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gate = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(1100):
                x = x.relu()
            return x.sigmoid() * self.gate(x) + self.conv(x)

    assert sums(Deep()) == []
