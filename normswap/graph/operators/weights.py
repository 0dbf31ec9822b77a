"""Operators with a weight: convolutions, Linear, matrix products, embeddings, other affines.

On its output side y = W x + b folds in s y + m t as W' = s W, b' = s b + m t, one number for each
output channel. On its input side it folds in x = s x' + m t as W' = W s, b' = b + m W t, one for
each input channel; zeros that a convolution pads with are no s x' + m t, so there the shift must be
absent.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from normswap.core.errors import Unsupported
from normswap.graph.operators.layout import along, channels_of, of_operand
from normswap.graph.operators.moving import order_of
from normswap.graph.operators.operator import define, is_a
from normswap.graph.operators.rule import (
    ChannelIndex,
    Constraints,
    Context,
    Equation,
    Folding,
    Layouts,
    Side,
    argument,
    has_argument,
    no_shift,
    passes,
    shape_of,
)

aten = torch.ops.aten


class Weighted:
    """An operator that folds in whatever reaches it.

    Args:
        rows: the first axis of its weight has its output channels. Then a weight that the forward
            computes (masked, sliced) folds in the scale like any other value, and goes on with it
            to what it is computed from: s (M W) = M (s W).
    """

    def __init__(
        self,
        fold: Callable[[fx.Node, fx.Node, Tensor, Constraints, Context], None],
        *,
        rows: bool = False,
    ) -> None:
        self._fold, self._rows = fold, rows

    def propagate(self, node: fx.Node, known: Layouts, context: Context) -> Layouts:
        weight, bias = self._computed(node, context)
        if weight is None or (node not in known and weight not in known):
            return {}
        shape, rank = shape_of(weight), len(shape_of(node))
        axis = rank - len(shape) + 1 if len(shape) > 2 else rank - 1
        if node in known:
            channels = channels_of(known[node], axis, shape[0])
        else:
            channels = channels_of(known[weight], 0, shape[0])
        forced = {node: along(rank, axis, channels), weight: along(len(shape), 0, channels)}
        return forced if bias is None else {**forced, bias: channels}

    def constraints(self, node: fx.Node, known: Layouts, context: Context) -> Constraints:
        constraints = Constraints()
        weight, bias = self._computed(node, context)
        if weight is not None and node in known:
            constraints.equations += no_shift(weight, why="its shift meets a weight")
            if bias is None:
                channel_index = _channel_index(
                    known[weight].flatten().expand(shape_of(weight)[0]), shape_of(weight)[:1]
                )
                constraints.foldings.append(
                    Folding(
                        node,
                        node,
                        "out",
                        weight,
                        None,
                        channel_index,
                        channel_index,
                        bias_alone=True,
                    )
                )
            else:
                constraints.equations += passes(node, bias)
            known = {
                value: layout
                for value, layout in known.items()
                if value not in (node, weight, bias)
            }
        for value in dict.fromkeys((node, *node.all_input_nodes)):
            if value in known:
                self._fold(node, value, known[value], constraints, context)
        return constraints

    def _computed(self, node: fx.Node, context: Context) -> tuple[fx.Node | None, fx.Node | None]:
        """The weight, if the forward computes it, and the bias."""
        weight = argument(node, "weight") if self._rows else None
        if not isinstance(weight, fx.Node) or not context.computed(weight):
            return None, None
        return weight, argument(node, "bias")


# --- convolutions -----------------------------------------------------------------------------


def _conv(
    node: fx.Node, value: fx.Node, layout: Tensor, constraints: Constraints, _: Context
) -> None:
    weight, bias = argument(node, "weight"), argument(node, "bias")
    out_channels, in_channels, *kernel = shape_of(weight)
    groups, ones = int(argument(node, "groups")), (1,) * len(kernel)
    # Counted from the right, so that an unbatched (C, H, W) is told from a batched one.
    axis = len(shape_of(value)) - len(kernel) - 1
    if value is node:
        channels = channels_of(layout, axis, out_channels)
        channel_index = _channel_index(channels, (out_channels, 1, *ones))
        constraints.foldings.append(
            Folding(
                node,
                value,
                "out",
                weight,
                bias,
                channel_index,
                _channel_index(channels, (out_channels,)),
            )
        )
        return
    _only(value, argument(node, "input"))
    channels = channels_of(layout, axis, in_channels * groups)
    over = tuple(range(1, len(kernel) + 2))
    channel_index = _channel_index(channels, (1, in_channels, *ones), over=over)
    if groups > 1:
        view = (groups, out_channels // groups, in_channels, *kernel)
        over = tuple(range(2, len(view)))
        channel_index = _channel_index(
            channels, (groups, 1, in_channels, *ones), view=view, over=over
        )
    bias_index = ChannelIndex((out_channels,))
    constraints.foldings.append(Folding(node, value, "in", weight, bias, channel_index, bias_index))
    if pads(node):
        constraints.equations += no_shift(
            value, why="its shift meets the zero padding of a convolution"
        )


def _convolution(
    node: fx.Node, value: fx.Node, layout: Tensor, constraints: Constraints, context: Context
) -> None:
    """What `run_decompositions` of an exported program makes of both."""
    either = _conv_transpose if is_transposed(node) else _conv
    either(node, value, layout, constraints, context)


def is_transposed(node: fx.Node) -> bool:
    """Whether a convolution is a transposed one."""
    if has_argument(node, "transposed"):
        return bool(argument(node, "transposed"))
    return is_a(node, "transposed convolution")


def pads(node: fx.Node) -> bool:
    """Whether a convolution puts zeros around its input."""
    padding = argument(node, "padding")
    if isinstance(padding, str):
        return padding != "valid" and any(
            size > 1 for size in shape_of(argument(node, "weight"))[2:]
        )
    return any(padding) if isinstance(padding, (list, tuple)) else bool(padding)


def _is_pointwise(node: fx.Node, kernel: list[int]) -> bool:
    """Whether a transposed convolution computes every output position from one of the input."""
    stride, padding, more = (argument(node, n) for n in ("stride", "padding", "output_padding"))
    return {*kernel, *stride} <= {1} and not any([*padding, *more])


def _conv_transpose(
    node: fx.Node, value: fx.Node, layout: Tensor, constraints: Constraints, _: Context
) -> None:
    weight, bias = argument(node, "weight"), argument(node, "bias")
    in_channels, out_channels, *kernel = shape_of(weight)
    groups, ones = int(argument(node, "groups")), (1,) * len(kernel)
    axis = len(shape_of(value)) - len(kernel) - 1
    if value is not node:
        _only(value, argument(node, "input"))
        channels = channels_of(layout, axis, in_channels)
        over = (0, *range(2, len(kernel) + 2))
        channel_index = _channel_index(channels, (in_channels, 1, *ones), over=over)
        if groups > 1:
            view = (groups, in_channels // groups, out_channels, *kernel)
            over = (1, *range(3, len(view)))
            channel_index = _channel_index(channels, (*view[:2], 1, *ones), view=view, over=over)
        bias_index = ChannelIndex((out_channels * groups,))
        constraints.foldings.append(
            Folding(node, value, "in", weight, bias, channel_index, bias_index)
        )
        if not _is_pointwise(node, kernel):
            why = "its shift meets a transposed convolution, whose windows overlap differently"
            constraints.equations += no_shift(value, why=why)
        return
    channels = channels_of(layout, axis, out_channels * groups)
    channel_index = _channel_index(channels, (1, out_channels, *ones))
    if groups > 1:
        view = (groups, in_channels // groups, out_channels, *kernel)
        channel_index = _channel_index(channels, (groups, 1, out_channels, *ones), view=view)
    bias_index = _channel_index(channels, (out_channels * groups,))
    constraints.foldings.append(
        Folding(node, value, "out", weight, bias, channel_index, bias_index)
    )


# --- matrices ---------------------------------------------------------------------------------


def _linear(
    node: fx.Node, value: fx.Node, layout: Tensor, constraints: Constraints, _: Context
) -> None:
    weight, bias = argument(node, "weight"), argument(node, "bias")
    out_features, in_features = shape_of(weight)
    last = len(shape_of(value)) - 1
    if value is node:
        channels = channels_of(layout, last, out_features)
        channel_index, bias_index = (
            _channel_index(channels, (out_features, 1)),
            _channel_index(channels, (out_features,)),
        )
        constraints.foldings.append(
            Folding(node, value, "out", weight, bias, channel_index, bias_index)
        )
    else:
        _only(value, argument(node, "input"))
        channel_index = _channel_index(
            channels_of(layout, last, in_features), (1, in_features), over=(1,)
        )
        bias_index = ChannelIndex((out_features,))
        constraints.foldings.append(
            Folding(node, value, "in", weight, bias, channel_index, bias_index)
        )


def _addmm(
    node: fx.Node, value: fx.Node, layout: Tensor, constraints: Constraints, c: Context
) -> None:
    """b + x W with a constant W (in, out), or the transpose of a constant."""
    bias, left, right = (argument(node, name) for name in ("self", "mat1", "mat2"))
    weight = transposed_by(right)
    if c.constant(weight) is None or len(shape_of(weight)) != 2:
        raise Unsupported("a product of two computed matrices lies between them")
    if argument(node, "alpha") != 1 or argument(node, "beta") != 1:
        raise Unsupported("a scaled matrix product lies between them")
    in_features, out_features = shape_of(right)
    in_axis, out_axis = (0, 1) if weight is right else (1, 0)
    last = len(shape_of(value)) - 1
    if value is node:
        channels = channels_of(layout, last, out_features)
        bias_index = _channel_index(channels, (out_features,))
        channel_index = _channel_index(channels, _on(out_axis, out_features))
    else:
        _only(value, left)
        channels = channels_of(layout, last, in_features)
        channel_index = _channel_index(channels, _on(in_axis, in_features), over=(in_axis,))
        bias_index = ChannelIndex((out_features,))
    side = "out" if value is node else "in"
    if c.constant(bias) is None or shape_of(bias) != (out_features,):
        raise Unsupported("a product is added to something that is no bias")
    transpose = None if weight is right else right
    constraints.foldings.append(
        Folding(node, value, side, weight, bias, channel_index, bias_index, False, transpose)  # type: ignore[arg-type]
    )


def _grouped(
    node: fx.Node, value: fx.Node, layout: Tensor, constraints: Constraints, c: Context
) -> None:
    """Rows of x, group by group, times the matrices of W (groups, in, out): a mixture of experts.

    All groups have the same channels, so that the scale goes into all of their matrices alike.
    """
    rows, right = node.args[0], node.args[1]
    assert isinstance(right, fx.Node)
    weight = transposed_by(right)
    if c.constant(weight) is None or len(shape_of(right)) != 3 or len(shape_of(value)) != 2:
        raise Unsupported("a product of computed matrices lies between them")
    if has_argument(node, "bias") and argument(node, "bias") is not None:
        raise Unsupported("a product of groups with a bias lies between them")
    _, inputs, outputs = shape_of(right)
    in_axis, out_axis = (1, 2) if weight is right else (2, 1)
    if value is not node:
        _only(value, rows)
    axis, size = (out_axis, outputs) if value is node else (in_axis, inputs)
    shape = tuple(size if each == axis else 1 for each in range(3))
    channels = channels_of(layout, 1, size)
    side: Side = "out" if value is node else "in"
    placed = _channel_index(channels, shape)
    transpose = None if weight is right else right
    constraints.foldings.append(
        Folding(node, value, side, weight, None, placed, None, False, transpose)
    )


def transposed_by(node: fx.Node) -> fx.Node:
    """The matrix, or matrices, that `node` transposes; `node` itself where it does not."""
    if not is_a(node, "permute") or order_of(node) not in ([1, 0], [0, 2, 1]):
        return node
    if len(node.users) > 1:
        raise Unsupported("a weight is transposed once for several products")
    (matrix,) = node.all_input_nodes
    return matrix


class Embedding:
    """Rows of a table: the table is a value like any other, its last axis the channels."""

    def propagate(self, node: fx.Node, known: Layouts, context: Context) -> Layouts:
        table = argument(node, "weight")
        if node not in known or any(size > 1 for size in known[node].shape[:-1]):
            raise Unsupported("a table of embeddings lies between them")
        return {table: of_operand(known[node], shape_of(table))}

    def constraints(self, node: fx.Node, known: Layouts, context: Context) -> Constraints:
        table = argument(node, "weight")
        return Constraints([Equation({node: 1.0, table: -1.0}, "is looked up")])


# --- channel index ------------------------------------------------------------------------------


def _channel_index(
    channels: Tensor,
    shape: tuple[int, ...],
    *,
    view: tuple[int, ...] | None = None,
    over: tuple[int, ...] = (),
) -> ChannelIndex:
    plain = torch.equal(channels, torch.arange(channels.numel()))
    return ChannelIndex(shape, None if plain else tuple(channels.tolist()), view, over)


def _on(axis: int, size: int) -> tuple[int, ...]:
    """The shape of `size` numbers along one axis of a matrix."""
    return (size, 1) if axis == 0 else (1, size)


def _only(value: fx.Node, expected: Any) -> None:
    if value is not expected:
        raise Unsupported("a weight is computed from it")


define(
    "convolution",
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
    rule=Weighted(_conv, rows=True),
)
define("convolution", aten.convolution.default, rule=Weighted(_convolution))
define(
    "transposed convolution",
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
    rule=Weighted(_conv_transpose, rows=True),
)
define("linear", aten.linear.default, rule=Weighted(_linear, rows=True))
define("addmm", aten.addmm.default, rule=Weighted(_addmm))
define(
    "grouped matmul",
    aten._grouped_mm.default,
    "transformers.grouped_mm_fallback.default",
    name="grouped_mm",
    rule=Weighted(_grouped),
)
define("embedding", aten.embedding.default, rule=Embedding())
