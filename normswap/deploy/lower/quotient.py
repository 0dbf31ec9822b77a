"""The rule `Quotient`: an inverse as a quotient, for Core ML.

ONNX Runtime's Core ML provider writes a Reciprocal as Core ML's `inverse`, which adds 1e-4 to what
it inverts: the inverse of a standard deviation of 0.01 comes out 1 % too small (docs/onnx.md has
the source). A Div has nothing added.
"""

import onnx_ir as ir

from normswap.deploy.lower.emit import Emitter, NodeRule


class Quotient(NodeRule):
    """As this module says."""

    def rewrite(self, model: ir.Model, node: ir.Node) -> bool:
        (value,) = node.inputs if node.op_type == "Reciprocal" and node.domain == "" else (None,)
        if value is None or value.dtype != ir.DataType.FLOAT:
            return False
        emit = Emitter(model, node.outputs[0], "quotient")
        emit.replace(emit.op("Div", emit.constant(1), value))
        return True
