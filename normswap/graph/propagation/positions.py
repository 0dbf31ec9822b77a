"""Which position of a value every channel belongs to, and whether an operator keeps them together.

What acts on each position by itself commutes with an operator that moves positions as a whole. A
position may hold every channel several times, as those of several heads, or of pixels side by side:
each such *block* counts as a position of its own.
"""

from math import prod

import torch
from torch import Tensor, fx

from normswap.core.errors import Unsupported
from normswap.graph.operators import is_a
from normswap.graph.operators.layout import FREE, NONE, at_every_position, compressed, joined
from normswap.graph.operators.moving import positions_of, unread
from normswap.graph.operators.rule import Context, Layouts


def channel_axes(layout: Tensor) -> tuple[int, ...]:
    """The axes that the channels lie along."""
    return tuple(axis for axis, size in enumerate(at_every_position(layout).shape) if size > 1)


def moved_positions(
    node: fx.Node, known: Layouts, context: Context, *, whole: bool
) -> dict[fx.Node, Tensor]:
    """The layouts of the output and of all inputs of an operator that moves elements.

    Args:
        known: the layout of the output, or of at least one input.
        whole: where an input is changed, all positions of it are, also those that others read.

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
    layout, unknown = known.get(node), NONE if node in known else FREE
    if any(source in known for source in sources):
        parts = [
            known[source].expand(shape).flatten()
            if source in known
            else torch.full((prod(shape),), unknown)
            for source, shape in zip(sources, shapes, strict=True)
        ]
        moved = compressed(torch.cat([*parts, torch.tensor([FREE])])[position])
        layout = moved if layout is None else joined(layout, moved)
    assert layout is not None
    forced = {node: layout}
    wanted, flat = layout.expand(position.shape).flatten(), position.flatten()
    start, numbers = 0, []
    for source, shape in zip(sources, shapes, strict=True):
        mine = (flat >= start) & (flat < start + prod(shape))
        others = FREE if whole else int(unread(node, source))
        found = torch.full((prod(shape),), others)
        found[flat[mine] - start] = wanted[mine]
        found = compressed(found.view(shape))
        if mine.any():
            forced[source] = found
        numbers.append(start + _numbered(found, shape))
        start += prod(shape)
    # All channels of a position come from one position, or from the zeros of a padding.
    origin = torch.cat([*numbers, torch.tensor([-1])])[position]
    if not _are_one(origin, layout):
        raise Unsupported("channels of several positions meet in one")
    return forced


def _are_one(origin: Tensor, layout: Tensor) -> bool:
    """Whether the channels of each position, or block, have the same number in `origin`."""
    over, changes = channel_axes(layout), layout != NONE
    if bool(changes.all()) and not blocks_of(layout.flatten()).any():
        return torch.equal(origin.amin(over), origin.amax(over))
    if not changes.any():
        return True
    changes = changes.expand(origin.shape).flatten()
    own = _numbered(layout, tuple(origin.shape))[changes]
    origin = origin.flatten()[changes]
    one = origin.new_zeros(1 + int(own.max())).scatter(0, own, origin)
    return torch.equal(one[own], origin)


def _numbered(layout: Tensor, shape: tuple[int, ...]) -> Tensor:
    """For each element of a value of `shape` the number of its position, or block, flat."""
    axes = channel_axes(layout)
    sizes = [1 if axis in axes else size for axis, size in enumerate(shape)]
    position = torch.arange(prod(sizes)).view(sizes).expand(shape).flatten()
    blocks = blocks_of(layout.flatten())
    if not blocks.any():
        return position
    return position * (1 + int(blocks.max())) + blocks.view(layout.shape).expand(shape).flatten()


def blocks_of(channels: Tensor) -> Tensor:
    """For each of `channels` how many of the same came before it: its block."""
    order = channels.argsort(stable=True)
    in_order = channels[order]
    begins = torch.searchsorted(in_order, in_order)
    return torch.empty_like(order).scatter(0, order, torch.arange(len(order)) - begins)
