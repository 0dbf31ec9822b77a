"""Operators that move whole positions, all channels of each together.

The layout of a value (`graph.affine.layout`) says which channel each element is. Where channels
move apart (in shift networks, say) that is not enough: what acts on each position by itself does
not commute with that. So positions are followed as well.
"""

from math import prod

import torch
from torch import Tensor, fx

from normswap.core.errors import Unsupported
from normswap.graph.operators import is_a
from normswap.graph.operators.layout import FREE, compressed
from normswap.graph.operators.moving import positions_of
from normswap.graph.operators.rule import Context, Layouts


def channel_axes(layout: Tensor) -> tuple[int, ...]:
    """The axes that the channels lie along."""
    return tuple(axis for axis, size in enumerate(layout.shape) if size > 1)


def moved_positions(node: fx.Node, known: Layouts, context: Context) -> dict[fx.Node, Tensor]:
    """The layouts of the output and of all inputs of an operator that moves elements.

    Args:
        known: the layout of the output, or of at least one input.

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
    layout = known.get(node)
    if layout is None:
        parts = [
            known[source].expand(shape).flatten()
            if source in known
            else torch.full((prod(shape),), FREE)
            for source, shape in zip(sources, shapes, strict=True)
        ]
        layout = compressed(torch.cat([*parts, torch.tensor([FREE])])[position])
    forced = {node: layout}
    wanted, flat = layout.expand(position.shape).flatten(), position.flatten()
    start, numbers = 0, []
    for source, shape in zip(sources, shapes, strict=True):
        mine = (flat >= start) & (flat < start + prod(shape))
        found = torch.full((prod(shape),), FREE)
        found[flat[mine] - start] = wanted[mine]
        found = compressed(found.view(shape))
        if mine.any():
            forced[source] = found
        numbers.append(start + _numbered(found, shape))
        start += prod(shape)
    # All channels of a position come from one position, or from the zeros of a padding.
    origin = torch.cat([*numbers, torch.tensor([-1])])[position]
    over = channel_axes(layout)
    if not torch.equal(origin.amin(over), origin.amax(over)):
        raise Unsupported("channels of several positions meet in one")
    return forced


def _numbered(layout: Tensor, shape: tuple[int, ...]) -> Tensor:
    """For each element of a value of `shape` the number of its position, flat."""
    axes = channel_axes(layout)
    sizes = [1 if axis in axes else size for axis, size in enumerate(shape)]
    return torch.arange(prod(sizes)).view(sizes).expand(shape).flatten()
