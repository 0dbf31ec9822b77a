"""Normalizations with the statistics of the sample: Layer-, Group-, Instance- and RMSNorm.

Each computes y = g n + b with n = (x - mean) / sqrt(var + eps) over a set of elements (RMSNorm
without the mean). So after it g and b absorb an affine as a weight and a bias do. And before it n
does not see a shift that is the same for a whole set (`drops_shift`): what comes right before, and
whose scale moves on to earlier weights, leaves its shift behind.

A scale does not vanish: s x has the n of x with eps / s^2, and s is another one for every channel
while eps is one number. Only a scale that is the same for all channels could change eps instead,
which no BatchNorm has. A BatchNorm that trains is never met: what is captured of training mode has
all of them in eval mode.
"""

from typing import Any

import torch
from torch import Tensor, fx

from normswap.graph.layout import NONE, channels_of
from normswap.graph.norm_modules import Unsupported
from normswap.graph.rules.rule import Absorbing, Context, Settled, Slots, argument, shape_of
from normswap.graph.rules.weights import Weighted, slots_of

aten = torch.ops.aten


def drops_shift(node: fx.Node, layout: Tensor, shift: Tensor | None) -> bool:
    """Whether a normalization of a value with `layout` does not see the shift of its affine.

    Args:
        shift: (C,), that of every channel; None where the numbers will change.
    """
    if node.target not in _SETS:
        return False
    shape = shape_of(node)
    if node.target is aten.instance_norm.default and not argument(node, "use_input_stats"):
        return False
    seen = layout if shift is None else torch.cat([shift, shift.new_zeros(1)])[layout]
    sets = seen.expand(shape).reshape(*_SETS[node.target](node, shape), -1)
    return bool((sets == sets[..., :1]).all())


def _rows(node: fx.Node, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[: len(shape) - len(argument(node, "normalized_shape"))]


# The sets that one mean is taken over, as the leading axes of a view of the value.
_SETS: dict[Any, Any] = {
    aten.layer_norm.default: _rows,
    aten.group_norm.default: lambda node, shape: (shape[0], argument(node, "num_groups")),
    aten.instance_norm.default: lambda node, shape: shape[:2],
}


def _normalization(
    node: fx.Node, value: fx.Node, layout: Tensor, settled: Settled, _: Context
) -> None:
    if value is not node:
        raise Unsupported("a normalization with the statistics of the sample takes it")
    weight = argument(node, "weight")
    bias = argument(node, "bias") if node.target is not aten.rms_norm.default else None
    if weight is None or len(shape_of(weight)) != 1:
        raise Unsupported("a normalization without a gain for each channel lies between them")
    axis = layout.dim() - 1 if node.target in _LAST else 1
    (size,) = shape_of(weight)
    slots = slots_of(channels_of(layout, axis, size), (size,))
    gives_bias = node.target is not aten.rms_norm.default
    settled.absorbing.append(
        Absorbing(node, value, "out", weight, bias, slots, slots, gives_bias=gives_bias)
    )


_LAST = (aten.layer_norm.default, aten.rms_norm.default)
NORMALIZATIONS: dict[Any, Weighted] = dict.fromkeys(
    (*_SETS, aten.rms_norm.default), Weighted(_normalization)
)
