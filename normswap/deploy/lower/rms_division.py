"""The rule `RmsDivision`: an RMSNorm in the form that ONNX Runtime fuses into one operator.

torch's exporter writes x / sqrt(mean(x^2) + eps) below opset 23 as Sqrt, Reciprocal, Mul. ONNX
Runtime's fusion of an RMSNorm (SimplifiedLayerNormalization) knows Sqrt, Div alone. The rule takes
a mean over the last axis, as the fusion does.
"""

import onnx_ir as ir
from onnx_ir.convenience import get_const_tensor

from normswap.deploy.lower.emit import Emitter, NodeRule, only_use, producer


class RmsDivision(NodeRule):
    """As this module says."""

    def rewrite(self, model: ir.Model, node: ir.Node) -> bool:
        if node.op_type != "Mul" or node.domain != "":
            return False
        for x, inverse in (node.inputs, reversed(node.inputs)):
            reciprocal = producer(inverse, "Reciprocal")
            root = producer(reciprocal.inputs[0], "Sqrt") if reciprocal else None
            if x is None or root is None or inverse is None or not only_use(inverse):
                continue
            if not _of_the_last_axis(root):
                continue
            emit = Emitter(model, node.outputs[0], "rms")
            quotient = emit.op("Div", x, root.outputs[0])
            quotient.shape, quotient.type = node.outputs[0].shape, node.outputs[0].type
            emit.replace(quotient)
            return True
        return False


def _of_the_last_axis(root: ir.Node) -> bool:
    """Whether `root` is that of a mean over the last axis plus eps."""
    total = producer(root.inputs[0], "Add")
    mean = producer(total.inputs[0], "ReduceMean") if total else None
    given = mean.inputs[1] if mean and len(mean.inputs) > 1 else None
    shape = mean.inputs[0].shape if mean and mean.inputs[0] else None
    axes = get_const_tensor(given) if given is not None else None
    if shape is None or axes is None:
        return False
    return [int(axis) % len(shape) for axis in axes.numpy().ravel()] == [len(shape) - 1]
