"""The rule `AffineRule`: a constant gain and bias of the channels, merged with what follows.

Mul gamma and Add beta are two passes over memory, the activation behind them is a third, and the
sum of a residual connection a fourth. As a depthwise 1x1 convolution of weight gamma and bias beta
they are one: ONNX Runtime keeps convolutions in a blocked layout of its own, and merges the sum
and the activation behind one into it. Where the next operator is a convolution, the value must go
into that layout anyway; elsewhere the way there and back would cost more than it saves.

The rule requires float32 of shape (N, C, H, W) with known C, and a convolution that reads the
result, directly or behind activations and sums.
"""

import onnx_ir as ir

from normswap.deploy.lower.emit import (
    Emitter,
    NodeRule,
    per_channel,
    scaled_and_shifted,
    sizes,
)

# What ONNX Runtime computes in the blocked layout, or merges into a convolution.
_THROUGH = {"Relu", "Sigmoid", "Tanh", "LeakyRelu", "Clip", "HardSigmoid", "Add", "MaxPool"}


class AffineRule(NodeRule):
    """As this module says."""

    def rewrite(self, model: ir.Model, node: ir.Node) -> bool:
        found = scaled_and_shifted(node)
        if found is None:
            return False
        x, y = found[0], node.outputs[0]
        shape = sizes(x)
        if shape is None or len(shape) != 4 or not shape[1] or y.shape != x.shape:
            return False
        channels = shape[1]
        gamma, beta = (per_channel(each, 4, channels) for each in found[1:])
        if gamma is None or beta is None or not merges(y):
            return False
        emit = Emitter(model, y, "affine")
        weight, bias = emit.constant(gamma.reshape(channels, 1, 1, 1)), emit.constant(beta)
        emit.replace(emit.op("Conv", x, weight, bias, group=channels, kernel_shape=[1, 1]))
        return True


def merges(value: ir.Value) -> bool:
    """Whether `value`, of shape (N, C, H, W), is read by a convolution, or behind `_THROUGH`."""
    if value.shape is None or len(value.shape) != 4:
        return False
    seen, waiting = set(), [value]
    while waiting:
        for node, _ in waiting.pop().uses():
            if node.op_type == "Conv":
                return True
            if node.op_type in _THROUGH and node not in seen:
                seen.add(node)
                waiting += node.outputs
    return False
