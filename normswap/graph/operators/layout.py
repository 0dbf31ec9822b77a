"""Which channel of a normalization every element of a value belongs to.

The affine of a normalization gives each channel c its own scale s[c] and shift t[c]. Where it lies
in another value of the graph is a *layout*: an integer tensor with as many axes as the value, of
size 1 on every axis along which it does not vary, that holds for each element the channel whose
affine it carries, or `NONE`. For a value (N, C, H, W) it is (1, C, 1, 1) with 0, 1, ..., C - 1;
after a pixel shuffle, a slice or a concatenation it is whatever the operator makes of it. That is
all that has to be known of an operator that only moves elements: it moves the layout as it moves
the value.
"""

import torch
from torch import Tensor

from normswap.core.errors import Unsupported

NONE = -1  # carries no affine
FREE = -2  # anything will do: nobody looks at this element


def along(rank: int, axis: int, channels: Tensor) -> Tensor:
    """The layout of a value of `rank` axes whose `axis` carries `channels`."""
    shape = [1] * rank
    shape[axis] = -1
    return channels.view(shape)


def compressed(layout: Tensor) -> Tensor:
    """`layout` with size 1 on every axis along which it does not vary; `FREE` becomes what fits."""
    free = layout == FREE
    any_free = bool(free.any())  # most often none is, and there is no need to reduce or to fill in
    for axis in range(layout.dim()):
        if layout.shape[axis] == 1 or not layout.numel():
            continue
        one = layout.amax(axis, keepdim=True) if any_free else layout.narrow(axis, 0, 1)
        filled = torch.where(free, one, layout) if any_free else layout
        if torch.equal(filled, one.expand_as(layout)):
            layout = one
            free = layout == FREE
    return torch.where(free, NONE, layout) if any_free else layout


def joined(first: Tensor, second: Tensor) -> Tensor:
    """What carries both; `NONE` gives way.

    Raises:
        Unsupported: an element would carry the affine of two channels.
    """
    shape = _broadcast(first, second)
    first, second = first.expand(shape), second.expand(shape)
    if ((first != second) & (first != NONE) & (second != NONE)).any():
        raise Unsupported("two channels of it meet in one")
    return compressed(torch.maximum(first, second))


def equal(first: Tensor, second: Tensor) -> bool:
    """Whether both say the same of every element."""
    shape = _broadcast(first, second)
    return torch.equal(first.expand(shape), second.expand(shape))


def _broadcast(first: Tensor, second: Tensor) -> list[int]:
    return [max(sizes) for sizes in zip(first.shape, second.shape, strict=True)]


def of_operand(layout: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The layout of an operand of `shape` that is broadcast to the value with `layout`.

    Raises:
        Unsupported: it is broadcast over channels.
    """
    extra = layout.dim() - len(shape)
    if any(size > 1 for size in layout.shape[:extra]) or any(
        has > 1 and size == 1 for has, size in zip(layout.shape[extra:], shape, strict=True)
    ):
        raise Unsupported("one number for several channels lies between them")
    return layout.view(layout.shape[extra:])


def at_every_position(layout: Tensor) -> Tensor:
    """`layout` with the channels that some positions carry, and others do not, at all of them."""
    if not bool((layout == NONE).any()):
        return layout
    for axis in range(layout.dim()):
        one = layout.amax(axis, keepdim=True)
        if bool(((layout == one) | (layout == NONE)).all()):
            layout = one
    return layout


def channels_of(layout: Tensor, axis: int, size: int) -> Tensor:
    """The channel of each of the `size` positions of `axis`.

    Raises:
        Unsupported: they vary along another axis, or not all other axes have them alike.
    """
    if layout.numel() != layout.shape[axis]:
        if layout.shape[axis] == 1:
            raise Unsupported("normalizes another axis than its channels")
        if at_every_position(layout).numel() == layout.shape[axis]:
            raise Unsupported("only a part of it can be followed")
        raise Unsupported("its channels lie along several axes")
    return layout.flatten().expand(size)
