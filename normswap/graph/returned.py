"""What a captured model returns: which operator gave each tensor, and where its classes lie.

A value that is moved, joined or resized after a softmax or a sigmoid is still probabilities; the
channels of a Linear or a convolution are followed through the same operators to the output.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from normswap.core.compat import pytree
from normswap.core.errors import Unsupported
from normswap.graph.capture import Capture
from normswap.graph.index import Region
from normswap.graph.operators import is_a, operator_of
from normswap.graph.operators.layout import along
from normswap.graph.operators.operator import MOVES, WEIGHTED, rule_of
from normswap.graph.operators.rule import Context, argument, is_tensor, operands, shape_of
from normswap.graph.propagation.owners import Owners
from normswap.graph.propagation.positions import channel_axes

Origin = Literal["softmax", "log softmax", "sigmoid", "weight"]


@dataclass(frozen=True)
class Returned:
    """A tensor that a captured part of a model returns.

    Attributes:
        shape: of the tensor, on the example.
        origin: what gave its values; None for any other operator.
        axis: that of the classes or channels, counted from the end; None where it is not known.
    """

    shape: tuple[int, ...]
    origin: Origin | None
    axis: int | None


def returned(seen: Capture) -> dict[str, list[Returned | None]]:
    """The leaves of what each captured part of a model returns, by its path.

    None stands for a leaf that is no tensor. With several examples it is the first that counts.
    """
    context = Owners(seen).context(training=False)
    found: dict[str, list[Returned | None]] = {}
    for region in seen.regions:
        if not region.symbolic and region.path not in found:
            found[region.path] = [_of(leaf, context) for leaf in _leaves(region)]
    return found


def _leaves(region: Region) -> list[object]:
    (output,) = (node for node in region.graph.nodes if node.op == "output")
    found: list[object] = pytree.tree_leaves(output.args[0])
    return found


def _of(leaf: object, context: Context) -> Returned | None:
    if not isinstance(leaf, fx.Node) or not is_tensor(leaf):
        return None
    origin, axis, path = _followed(leaf)
    return Returned(tuple(shape_of(leaf)), origin, _carried(axis, path, context))


def _followed(leaf: fx.Node) -> tuple[Origin | None, int | None, Sequence[fx.Node]]:
    """What gives `leaf`, the axis of its classes there, and the values on the way, from there."""
    path, moved_alone = [leaf], True
    while True:
        value = path[-1]
        given = [each for each in operands(value) if is_tensor(each)] or _before(value)
        if moved_alone and is_a(value, "softmax", "log softmax"):
            name: Origin = "softmax" if is_a(value, "softmax") else "log softmax"
            return name, int(argument(value, "dim")), path[::-1]
        row = operator_of(value)
        if moved_alone and row is not None and row.unit_interval:
            _, axis, before = _followed(given[0])
            return "sigmoid", axis, [*before, *path[::-1]]
        if is_a(value, *WEIGHTED):
            convolves = is_a(value, "convolution", "transposed convolution")
            return "weight", 1 if convolves else -1, path[::-1]
        if not given or not is_a(value, *MOVES, "split", "same", "window", "sum", "product"):
            return None, None, path[::-1]
        if is_a(value, "concatenate", "stack") and len({_followed(each)[0] for each in given}) > 1:
            return None, None, path[::-1]  # several things side by side
        moved_alone &= not is_a(value, "sum", "product")
        path.append(max(given, key=lambda each: len(shape_of(each))))


def _before(value: fx.Node) -> list[fx.Node]:
    """The call of which `value` is one of several outputs takes these."""
    call = value.args[0] if value.args else None
    if isinstance(call, fx.Node) and is_a(call, "split"):
        return [each for each in operands(call) if is_tensor(each)]
    return []


def _carried(axis: int | None, path: Sequence[fx.Node], context: Context) -> int | None:
    """The `axis` of the first value of `path`, as it lies in the last one."""
    if axis is None:
        return None
    first = shape_of(path[0])
    layout = along(len(first), axis % len(first), torch.arange(first[axis]))
    known: dict[fx.Node, Tensor] = {path[0]: layout}
    try:
        for value in path[1:]:
            rule = rule_of(value)
            if is_a(value, "concatenate", "stack"):  # the other parts are alike
                parts = operands(value)
                if not all(_fits(layout, shape_of(part)) for part in parts):
                    return None  # channels lie along an axis of which the others have another size
                known |= dict.fromkeys(parts, layout)
            if rule is not None:
                known |= rule.propagate(value, dict(known), context)
            elif shape_of(value) == shape_of(operands(value)[0]):  # a function of each element
                known[value] = known[operands(value)[0]]
            layout = known[value]
    except (Unsupported, KeyError):
        return None
    axes = channel_axes(layout)
    return axes[0] - layout.dim() if len(axes) == 1 else None


def _fits(layout: Tensor, shape: Sequence[int]) -> bool:
    """Whether `layout` can be that of a tensor of this shape, as `expand` has it."""
    return len(layout.shape) == len(shape) and all(
        size in (1, whole) for size, whole in zip(layout.shape, shape, strict=True)
    )
