"""The rule `GroupNormalization`: GroupNorm, LayerNorm over a sample, and InstanceNorm.

What torch's exporter writes for a GroupNorm over (N, C, ...) is

    Reshape (N, groups, -1), InstanceNormalization, Reshape (N, C, ...), Mul gamma, Add beta

and for an InstanceNorm the InstanceNormalization alone. The rule requires float32, constant gains
and biases, and positions (H, W) of known size. It then takes, by the elements in a sample,

- LARGE and more: the mean and the sum of squares of each group by dot products (`dots.py`), from
  them a scale and a shift for each channel of each sample (Wu & He 2018, arXiv 1803.08494,
  equations 1 to 4), and these in one more pass: by a depthwise convolution whose weights are
  computed, if the batch is one (it merges with an activation behind it), else by Mul and Add;
- below, LayerNormalization over the rows, and Mul and Add, where `ChannelAffine` will merge them.

An InstanceNorm stays as it is unless it is large and the batch is one.

Measured with ONNX Runtime 1.31, two threads: tools/bench_onnx.py.
"""

from dataclasses import dataclass
from math import sqrt

import numpy as np
import onnx_ir as ir

from normswap.deploy.lower.dots import FEW_ROWS, sum_and_squares, sum_of_squared_deviations
from normswap.deploy.lower.emit import (
    Array,
    Emitter,
    constant_of,
    known,
    only_use,
    per_channel,
    producer,
    scaled_and_shifted,
    sizes,
)
from normswap.deploy.lower.mul_add import merges

# Elements in a sample from which on the passes over memory cost more than ten small operators.
LARGE = 300_000
# The same with FEW_ROWS, between which LayerNormalization divides its work.
LARGE_ROW = 150_000


@dataclass(frozen=True)
class _Norm:
    """A normalization of `x`, of shape (N, C, ...), over groups of channels; `y` is its value.

    `core` is its InstanceNormalization.
    """

    x: ir.Value
    y: ir.Value
    core: ir.Node
    shape: list[int | None]
    groups: int
    epsilon: float
    gamma: Array
    beta: Array


class GroupNormalization(ir.passes.InPlacePass):
    """As this module says."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        whole = [norm for node in model.graph if (norm := _grouped(node)) is not None]
        parts = {norm.core for norm in whole}
        alone = [
            norm
            for node in model.graph
            if node not in parts and (norm := _instance(node)) is not None
        ]
        lowered = [_lower(Emitter(model, norm.y, "group"), norm) for norm in whole + alone]
        return ir.passes.PassResult(model, any(lowered))


def _grouped(node: ir.Node) -> _Norm | None:
    """The normalization over groups whose last operator is `node`."""
    found = scaled_and_shifted(node)
    if found is None or not only_use(found[0]):
        return None
    back = producer(found[0], "Reshape")
    rows = back.inputs[0] if back else None
    inner = producer(rows, "InstanceNormalization")
    if rows is None or inner is None or not only_use(rows):
        return None
    view = producer(inner.inputs[0], "Reshape")
    x = view.inputs[0] if view else None
    shape, grouped = sizes(x) if x else None, sizes(inner.inputs[0]) if inner.inputs[0] else None
    y = node.outputs[0]
    if x is None or not shape or not grouped or len(shape) < 3 or len(grouped) != 3:
        return None
    channels, groups = shape[1], grouped[1]
    same = y.shape is not None and x.shape is not None and y.shape[1:] == x.shape[1:]
    unit, zero = constant_of(inner.inputs[1]), constant_of(inner.inputs[2])
    if not channels or not groups or channels % groups or not same:
        return None
    if unit is None or zero is None or (unit != 1).any() or zero.any():
        return None
    gamma = per_channel(found[1], len(shape), channels)
    beta = per_channel(found[2], len(shape), channels)
    if gamma is None or beta is None:
        return None
    return _Norm(x, y, inner, shape, groups, _epsilon(inner), gamma, beta)


def _instance(node: ir.Node) -> _Norm | None:
    """The normalization over single channels that `node` is."""
    if node.op_type != "InstanceNormalization" or node.domain != "":
        return None
    x, gamma, beta = node.inputs[0], constant_of(node.inputs[1]), constant_of(node.inputs[2])
    shape = sizes(x) if x else None
    if x is None or gamma is None or beta is None or not shape or len(shape) < 3 or not shape[1]:
        return None
    return _Norm(x, node.outputs[0], node, shape, shape[1], _epsilon(node), gamma, beta)


def _epsilon(node: ir.Node) -> float:
    return float(node.attributes.get_float("epsilon", 1e-5))


def _lower(emit: Emitter, norm: _Norm) -> bool:
    elements = known(norm.shape[1:])
    if elements is None:
        return False
    channels = len(norm.gamma)
    large = elements >= (LARGE if norm.groups >= FEW_ROWS else LARGE_ROW)
    # An InstanceNorm is one operator; only the merging with what follows is faster.
    if norm.groups == channels and not (large and norm.shape[0] == 1):
        return False
    if not large and not merges(norm.y):
        return False
    form = _by_dots if large else _by_rows
    emit.replace(form(emit, norm, channels, elements // norm.groups))
    return True


def _by_dots(emit: Emitter, norm: _Norm, channels: int, size: int) -> ir.Value:
    share = (1, norm.groups, channels // norm.groups, 1)
    mean, squares = sum_and_squares(emit, norm.x, norm.groups, channels, size)
    deviations = sum_of_squared_deviations(emit, mean, squares, size)
    deviation = emit.op("Sqrt", emit.op("Add", deviations, emit.constant(size * norm.epsilon)))
    gain = norm.gamma.astype(np.float64) * sqrt(size)  # of sums, where the formula has means
    scale = emit.op("Div", emit.constant(gain.reshape(share)), deviation)
    beta = emit.constant(norm.beta.reshape(share))
    shift = emit.op("Sub", beta, emit.op("Mul", mean, scale))
    if norm.shape[0] == 1:
        positions = [1] * (len(norm.shape) - 2)
        weight = emit.op("Reshape", scale, emit.shape(channels, 1, *positions))
        bias = emit.op("Reshape", shift, emit.shape(channels))
        return emit.op("Conv", norm.x, weight, bias, group=channels, kernel_shape=positions)
    spread = emit.shape(0, channels, *[1] * (len(norm.shape) - 2))
    scaled = emit.op("Mul", norm.x, emit.op("Reshape", scale, spread))
    return emit.op("Add", scaled, emit.op("Reshape", shift, spread))


def _by_rows(emit: Emitter, norm: _Norm, channels: int, size: int) -> ir.Value:
    rows = emit.op("Reshape", norm.x, emit.shape(0, norm.groups, -1))
    ones = emit.constant(np.ones(size))
    normal = emit.op("LayerNormalization", rows, ones, axis=-1, epsilon=norm.epsilon)
    back = emit.op("Reshape", normal, emit.shape(0, *[n or 0 for n in norm.shape[1:]]))
    back.shape, back.type = norm.x.shape, norm.x.type  # for the rules that follow
    broadcast = (channels, *[1] * (len(norm.shape) - 2))
    scaled = emit.op("Mul", back, emit.constant(norm.gamma.reshape(broadcast)))
    return emit.op("Add", scaled, emit.constant(norm.beta.reshape(broadcast)))
