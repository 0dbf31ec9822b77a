"""Normalizations with the statistics of the sample: Layer-, Group-, Instance- and RMSNorm.

Each computes y = g n + b with n = (x - mean) / sqrt(var + eps) over a set of elements (RMSNorm
without the mean). So after it g and b fold in an affine as a weight and a bias do. And before it n
does not see a shift that is the same for a whole set (`drops_shift`): what comes right before, and
whose scale moves on to earlier weights, leaves its shift behind.

A scale does not vanish: s x has the n of x with eps / s^2, and s is another one for every channel
while eps is one number. Only a scale that is the same for all channels could change eps instead,
which no BatchNorm has. A BatchNorm that trains is never met: what is captured of training mode has
all of them in eval mode.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from normswap.core.errors import Unsupported
from normswap.graph.operators.layout import channels_of
from normswap.graph.operators.operator import define, operator_of
from normswap.graph.operators.rule import (
    ChannelIndex,
    Constraints,
    Context,
    Folding,
    Layouts,
    argument,
    has_argument,
    shape_of,
)

aten = torch.ops.aten


def drops_shift(node: fx.Node, layout: Tensor, shift: Tensor | None) -> bool:
    """Whether a normalization of a value with `layout` does not see the shift of its affine.

    Args:
        shift: (C,), that of every channel; None where the numbers will change.
    """
    sets, operator = sets_of(node, layout), operator_of(node)
    if sets is None or operator is None or operator.normalizes == "rms":  # which takes no mean off
        return False
    if shift is not None:
        sets = torch.cat([shift, shift.new_zeros(1)])[sets]
    return bool((sets == sets[..., :1]).all())


def sets_of(node: fx.Node, layout: Tensor) -> Tensor | None:
    """The channels of `layout` in each set of elements that share statistics, along the last axis.

    None where `node` takes no statistics over such sets.
    """
    operator = operator_of(node)
    if operator is None or operator.normalizes not in ("layer", "rms", "group", "instance"):
        return None
    if operator.normalizes in ("layer", "rms"):
        return layout.flatten(layout.dim() - len(argument(node, "normalized_shape")))
    if operator.normalizes == "group":
        channels = layout.expand(-1, shape_of(node)[1], *layout.shape[2:])
        return channels.reshape(len(layout), argument(node, "num_groups"), -1)
    return layout.flatten(2) if argument(node, "use_input_stats") else None


class Normalization:
    """An operator that folds in an affine of its output into its gain and bias."""

    def propagate(self, node: fx.Node, known: Layouts, context: Context) -> Layouts:
        return {}

    def constraints(self, node: fx.Node, known: Layouts, context: Context) -> Constraints:
        if any(source in known for source in node.all_input_nodes):
            raise Unsupported("a normalization by the statistics of the sample lies between them")
        weight = argument(node, "weight")
        bias = argument(node, "bias") if has_argument(node, "bias") else None
        if weight is None or len(shape_of(weight)) != 1:
            raise Unsupported("a normalization without a gain per channel lies between them")
        (size,), layout = shape_of(weight), known[node]
        last = has_argument(node, "normalized_shape")
        channels = channels_of(layout, layout.dim() - 1 if last else 1, size)
        channel_index = ChannelIndex((size,), tuple(channels.tolist()))
        takes_bias = has_argument(node, "bias")
        return Constraints(
            foldings=[
                Folding(
                    node,
                    node,
                    "out",
                    weight,
                    bias,
                    channel_index,
                    channel_index,
                    gives_bias=takes_bias,
                )
            ]
        )


_RULE = Normalization()
define(
    "normalization",
    aten.batch_norm.default,
    # What run_decompositions makes of it; these return the statistics as well.
    aten.native_batch_norm.default,
    aten._native_batch_norm_legit.default,
    aten._native_batch_norm_legit_no_training.default,
    F.batch_norm,
    torch.batch_norm,
    normalizes="batch",
)
define(
    "normalization",
    *(aten.instance_norm.default, F.instance_norm, torch.instance_norm),
    rule=_RULE,
    normalizes="instance",
)
define(
    "normalization",
    *(aten.group_norm.default, F.group_norm, torch.group_norm),
    rule=_RULE,
    normalizes="group",
)
define(
    "normalization",
    *(aten.layer_norm.default, F.layer_norm, torch.layer_norm),
    rule=_RULE,
    normalizes="layer",
)
define(
    "normalization",
    *(aten.rms_norm.default, F.rms_norm, torch.rms_norm),
    rule=_RULE,
    normalizes="rms",
)
define("normalization", aten.native_layer_norm.default, normalizes="layer")
define("normalization", F.local_response_norm, normalizes="local_response")
