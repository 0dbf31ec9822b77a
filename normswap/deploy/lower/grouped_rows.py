"""The rule `GroupedRows`: the operator GroupNormalization, as torch writes it below opset 21.

ONNX defines it (from opset 21 on with a gain for each channel) by E[x^2] - E[x]^2, and so ONNX
Runtime computes it: of a blank image nothing is left but roundings. TensorRT's parser knows only
that of opset 18, and OpenVINO 2026.4 ends with a segmentation fault where the batch is fixed
(docs/onnx.md). The rule writes Reshape, InstanceNormalization, Reshape, Mul, Add, of which the
rules that follow make what suits the target.
"""

import numpy as np
import onnx_ir as ir

from normswap.deploy.lower.emit import Emitter, NodeRule, constant_of, known, sizes


class GroupedRows(NodeRule):
    """As this module says."""

    def rewrite(self, model: ir.Model, node: ir.Node) -> bool:
        if node.op_type != "GroupNormalization" or node.domain != "":
            return False
        x = node.inputs[0]
        shape = sizes(x) if x is not None else None
        gain, bias = (constant_of(value) for value in node.inputs[1:])
        if x is None or shape is None or gain is None or bias is None:
            return False
        groups = node.attributes.get_int("num_groups")
        if len(gain) != shape[1]:  # of opset 18: one for each group
            return False
        emit = Emitter(model, node.outputs[0], "rows")
        rows = emit.op("Reshape", x, emit.shape(0, groups, -1))
        rows.type, rows.shape = x.type, _grouped(x, shape, groups)
        ones, zeros = emit.constant(np.ones(groups)), emit.constant(np.zeros(groups))
        epsilon = node.attributes.get_float("epsilon", 1e-5)
        normal = emit.op("InstanceNormalization", rows, ones, zeros, epsilon=epsilon)
        normal.type, normal.shape = rows.type, rows.shape
        positions = [size or 0 for size in shape[1:]]
        whole = emit.shape(0, *positions) if all(positions) else emit.op("Shape", x)
        back = emit.op("Reshape", normal, whole)
        back.type, back.shape = x.type, x.shape
        broadcast = (-1, *[1] * (len(shape) - 2))
        scaled = emit.op("Mul", back, emit.constant(gain.reshape(broadcast)))
        scaled.type, scaled.shape = x.type, x.shape
        emit.replace(emit.op("Add", scaled, emit.constant(bias.reshape(broadcast))))
        return True


def _grouped(x: ir.Value, shape: list[int | None], groups: int) -> ir.Shape:
    """The shape of `x` with its channels in groups, each a row."""
    elements = known(shape[1:])
    assert x.shape is not None
    return ir.Shape([x.shape[0], groups, None if elements is None else elements // groups])
