"""The rules by which a per-channel affine moves through operators: one row for each operator.

- THROUGH: the operator commutes with the affine. The row tells the value that the affine moves to
  and the axis on which the channels lie there, or raises `Unsupported` with the reason.
- PRODUCERS: the operator is linear in a weight that has one slice per output channel, so it absorbs
  the affine: W' = s W, b' = s b + t. The row tells the weight, the bias and their layout.

An operator in neither stops the affine. A new rule is one row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx, nn

from normswap.graph.norm_modules import Unsupported

aten = torch.ops.aten
Value = tuple[fx.Node, int]  # a value and the axis of its channels


# --- through: operators that commute with an affine -------------------------------------------


def _same_value(node: fx.Node, axis: int, training: bool) -> Value:
    return node.all_input_nodes[0], axis


def _dropout(node: fx.Node, axis: int, training: bool) -> Value:
    # Dropout zeroes values, and an affine of zero is not zero: only its eval mode commutes.
    if argument(node, "p") and (training or argument(node, "train")):
        raise Unsupported("dropout lies between them, which does not commute where it is active")
    return node.all_input_nodes[0], axis


def _detach(node: fx.Node, axis: int, training: bool) -> Value:
    if training:  # gradients of gamma and beta would no longer arrive
        raise Unsupported("detach lies between them")
    return node.all_input_nodes[0], axis


def _reshape(node: fx.Node, axis: int, training: bool) -> Value:
    # Row-major order: an axis survives a reshape if as many elements lie before it as before.
    source = node.all_input_nodes[0]
    before, after = shape_of(source), shape_of(node)
    for candidate, size in enumerate(before):
        if size == after[axis] and prod(before[:candidate]) == prod(after[:axis]):
            return source, candidate
    raise Unsupported(f"{before} -> {after} does not keep the channels together")


def _permute(node: fx.Node, axis: int, training: bool) -> Value:
    dims = argument(node, "dims")
    return node.all_input_nodes[0], dims[axis] % len(dims)


def _transpose(node: fx.Node, axis: int, training: bool) -> Value:
    rank = len(shape_of(node))
    first, second = argument(node, "dim0") % rank, argument(node, "dim1") % rank
    return node.all_input_nodes[0], {first: second, second: first}.get(axis, axis)


def _cast(node: fx.Node, axis: int, training: bool) -> Value:
    source = node.all_input_nodes[0]
    if source.meta["val"].dtype != node.meta["val"].dtype:
        raise Unsupported(f"a cast to {node.meta['val'].dtype} lies between them")
    return source, axis


THROUGH: dict[Any, Callable[[fx.Node, int, bool], Value]] = {
    aten.alias.default: _same_value,
    aten.clone.default: _same_value,
    aten.contiguous.default: _same_value,
    aten.detach.default: _detach,
    aten.dropout.default: _dropout,
    aten.dropout_.default: _dropout,
    aten.feature_dropout.default: _dropout,
    aten.feature_dropout_.default: _dropout,
    aten.alpha_dropout.default: _dropout,
    aten.alpha_dropout_.default: _dropout,
    aten.feature_alpha_dropout.default: _dropout,
    aten.feature_alpha_dropout_.default: _dropout,
    aten.to.dtype: _cast,
    aten._to_copy.default: _cast,
    aten.view.default: _reshape,
    aten.reshape.default: _reshape,
    aten.flatten.using_ints: _reshape,
    aten.unflatten.int: _reshape,
    aten.squeeze.default: _reshape,
    aten.squeeze.dim: _reshape,
    aten.squeeze.dims: _reshape,
    aten.unsqueeze.default: _reshape,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
}


# --- producers: operators whose weight absorbs an affine ----------------------------------------


@dataclass(frozen=True)
class Produced:
    """A linear operator, and the arguments that hold its parameters.

    Attributes:
        weight, bias: what the operator reads.
        axis: where its output channels lie.
        groups: as in `Absorber`.
    """

    weight: fx.Node
    bias: fx.Node | None
    axis: int
    groups: int = 0


def _conv(node: fx.Node) -> Produced:
    spatial = len(shape_of(argument(node, "weight"))) - 2
    # Counted from the right, so that an unbatched (C, H, W) is told from a batched one.
    axis = len(shape_of(node)) - spatial - 1
    return Produced(argument(node, "weight"), argument(node, "bias"), axis)


def _conv_transpose(node: fx.Node) -> Produced:
    conv = _conv(node)
    return Produced(conv.weight, conv.bias, conv.axis, int(argument(node, "groups")))


def _linear(node: fx.Node) -> Produced:
    return Produced(argument(node, "weight"), argument(node, "bias"), len(shape_of(node)) - 1)


PRODUCERS: dict[Any, Callable[[fx.Node], Produced]] = {
    aten.conv1d.default: _conv,
    aten.conv2d.default: _conv,
    aten.conv3d.default: _conv,
    aten.conv1d.padding: _conv,
    aten.conv2d.padding: _conv,
    aten.conv3d.padding: _conv,
    aten.conv_transpose1d.default: _conv_transpose,
    aten.conv_transpose2d.input: _conv_transpose,
    aten.conv_transpose3d.input: _conv_transpose,
    aten.linear.default: _linear,
}

# The same without example inputs, where a node is a module and shapes are unknown: only what holds
# for every shape. A Linear is not here, since its channels are at axis 1 only of a (N, C) value.
THROUGH_MODULES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def argument(node: fx.Node, name: str) -> Any:
    """The argument `name` of an ATen call, wherever it was given, or its default."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    for position, formal in enumerate(schema):
        if formal.name == name:
            if position < len(node.args):
                return node.args[position]
            return node.kwargs.get(name, formal.default_value)
    raise KeyError(name)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of the tensor that a captured ATen node computes."""
    return tuple(node.meta["val"].shape)
