"""The taps of a convolution's kernel, and the one kernel that computes the sum of several.

A convolution takes for the output at position o the inputs at s o + f + d j, j = 0, ..., k - 1,
with s its stride, d its dilation, k the size of its kernel and f = -padding. Several with one
stride and one input are, summed, a convolution whose kernel has all their taps (RepVGG, arXiv
2101.03697, section 3.3; with several dilations UniRepLKNet, arXiv 2311.15599). An identity is a
depthwise kernel with a single tap; a Linear has no positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, prod

from torch import Tensor, nn

from normswap.core.errors import Unsupported

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Taps:
    """Where the taps of a kernel lie, as a tuple with a number for each spatial axis.

    Attributes:
        first: the position of the first tap: the negative padding.
        dilation: the distance from one to the next.
        size: how many there are.
        groups: groups of channels that do not mix.
    """

    first: tuple[int, ...]
    dilation: tuple[int, ...]
    size: tuple[int, ...]
    groups: int

    @property
    def last(self) -> tuple[int, ...]:
        """The position of the last tap."""
        axes = zip(self.first, self.dilation, self.size, strict=True)
        return tuple(first + dilation * (size - 1) for first, dilation, size in axes)

    @property
    def padding(self) -> tuple[int, ...]:
        """The zeros that a convolution adds on either side."""
        return tuple(-first for first in self.first)

    def work(self, channels: int) -> int:
        """Multiplications for one number of the output, from `channels` of the input."""
        return channels // self.groups * prod(self.size)


def taps_of(module: nn.Module) -> Taps:
    """The taps of a conv, or of a Linear, which has no positions.

    Raises:
        Unsupported: its padding is not the same on either side.
    """
    if isinstance(module, nn.Linear):
        return Taps((), (), (), 1)
    assert isinstance(module, CONVS)
    padding = module.padding
    if padding == "same":
        spans = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if any(span % 2 for span in spans):
            raise Unsupported("it pads one side more than the other")
        padding = tuple(span // 2 for span in spans)
    elif padding == "valid":
        padding = (0,) * len(module.kernel_size)
    assert not isinstance(padding, str)
    first = tuple(-p for p in padding)
    return Taps(first, module.dilation, module.kernel_size, module.groups)


def identity_taps(axes: int, channels: int) -> Taps:
    """The taps of an identity on a value with that many spatial axes."""
    return Taps((0,) * axes, (1,) * axes, (1,) * axes, channels)


def merged_taps(parts: Sequence[Taps]) -> Taps:
    """The fewest taps that hold those of all `parts`, in the finest groups that do.

    The output has floor((n - 1 - first - last) / stride) + 1 positions. With the lowest first of
    one part and the highest last of another this lies between those of the two, so at every size n
    at which the parts agree they agree with the whole, too.
    """
    first, dilation, size = [], [], []
    for axis in range(len(parts[0].first)):
        low = min(part.first[axis] for part in parts)
        high = max(part.last[axis] for part in parts)
        step = 0
        for part in parts:
            step = gcd(step, part.first[axis] - low, part.dilation[axis] * (part.size[axis] > 1))
        step = step or 1
        first.append(low)
        dilation.append(step)
        size.append((high - low) // step + 1)
    groups = gcd(*(part.groups for part in parts))
    return Taps(tuple(first), tuple(dilation), tuple(size), groups)


def spread(kernel: Tensor, part: Taps, whole: Taps) -> Tensor:
    """The kernel with the taps of `part`, as one with those of `whole`, zero elsewhere.

    Args:
        kernel: (C_out, C_in / part.groups, *part.size).

    Returns:
        (C_out, C_in / whole.groups, *whole.size).
    """
    outputs, inputs = kernel.shape[:2]
    each = part.groups // whole.groups  # groups of `part` in one of `whole`
    places: list[slice] = []
    for axis, size in enumerate(part.size):
        step = part.dilation[axis] // whole.dilation[axis] if size > 1 else 1
        start = (part.first[axis] - whole.first[axis]) // whole.dilation[axis]
        places.append(slice(start, start + step * (size - 1) + 1, step))
    grouped = kernel.reshape(whole.groups, each, outputs // part.groups, inputs, *part.size)
    result = kernel.new_zeros(*grouped.shape[:3], each, inputs, *whole.size)
    diagonal = result.diagonal(dim1=1, dim2=3)  # groups do not mix; a view, with `each` last
    diagonal[(slice(None),) * 3 + tuple(places)] = grouped.movedim(1, -1)
    return result.view(outputs, each * inputs, *whole.size)
