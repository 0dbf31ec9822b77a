"""The rule `RmsNorm`: an RMSNorm as one operator.

torch's exporter writes an RMSNorm of a user's own, and that of `center`, as its formula,
x / sqrt(mean(x^2) + eps) in Pow, ReduceMean, Add, Sqrt, Reciprocal, Mul; and `nn.RMSNorm`, too,
below opset 23. From opset 23 on the rule writes RMSNormalization, with the gain that is multiplied
behind it. Below, it writes Sqrt, Div alone, which is the form that ONNX Runtime's fusion of an
RMSNorm (SimplifiedLayerNormalization) knows. It takes a mean over the last axis, as the fusion
does.
"""

from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import get_const_tensor

from normswap.deploy.lower.emit import Emitter, NodeRule, constant_of, only_use, producer, sizes

_FIRST_RMS_NORMALIZATION = 23


class RmsNorm(NodeRule):
    """As this module says."""

    def rewrite(self, model: ir.Model, node: ir.Node) -> bool:
        quotient = _quotient(node)
        found = _root_mean_square(quotient[1]) if quotient else None
        if quotient is None or found is None:
            return False
        x, root = quotient
        if model.opset_imports[""] >= _FIRST_RMS_NORMALIZATION and _write_operator(
            model, node, x, found
        ):
            return True
        if node.op_type == "Div":
            return False
        emit = Emitter(model, node.outputs[0], "rms")
        divided = emit.op("Div", x, root.outputs[0])
        divided.shape, divided.type = node.outputs[0].shape, node.outputs[0].type
        emit.replace(divided)
        return True


def _quotient(node: ir.Node) -> tuple[ir.Value, ir.Node] | None:
    """x and the node of the root, where `node` divides x by it, or multiplies by its inverse."""
    if node.domain != "" or node.op_type not in ("Div", "Mul"):
        return None
    if node.op_type == "Div":
        x, root = node.inputs[0], producer(node.inputs[1], "Sqrt")
        return None if x is None or root is None else (x, root)
    for x, inverse in (node.inputs, reversed(node.inputs)):
        reciprocal = producer(inverse, "Reciprocal")
        root = producer(reciprocal.inputs[0], "Sqrt") if reciprocal else None
        if x is not None and root is not None and inverse is not None and only_use(inverse):
            return x, root
    return None


class _RootMeanSquare(NamedTuple):
    """A root of a mean over the last axis.

    Attributes:
        of: what is squared; None where that is not seen.
        epsilon: what is added to the mean; None where that is no constant.
    """

    of: ir.Value | None
    epsilon: float | None


def _root_mean_square(root: ir.Node) -> _RootMeanSquare | None:
    """What `root` is of, where that is a mean over the last axis plus eps."""
    total = producer(root.inputs[0], "Add")
    mean = producer(total.inputs[0], "ReduceMean") if total else None
    given = mean.inputs[1] if mean and len(mean.inputs) > 1 else None
    shape = mean.inputs[0].shape if mean and mean.inputs[0] else None
    axes = get_const_tensor(given) if given is not None else None
    if total is None or mean is None or shape is None or axes is None:
        return None
    if [int(axis) % len(shape) for axis in axes.numpy().ravel()] != [len(shape) - 1]:
        return None
    epsilon = constant_of(total.inputs[1])
    power = producer(mean.inputs[0], "Pow")
    exponent = constant_of(power.inputs[1]) if power else None
    squared = power is not None and exponent is not None and bool((exponent == 2).all())
    return _RootMeanSquare(
        power.inputs[0] if power is not None and squared else None,
        None if epsilon is None or epsilon.size != 1 else float(epsilon.reshape(())),
    )


def _write_operator(model: ir.Model, node: ir.Node, x: ir.Value, found: _RootMeanSquare) -> bool:
    """Put an RMSNormalization in the place of `node`, and of the product with a gain behind it."""
    normal, shape = node.outputs[0], sizes(x)
    if found.of is not x or found.epsilon is None or shape is None or shape[-1] is None:
        return False
    old, gain = normal, None
    uses = list(normal.uses())
    if only_use(normal) and uses[0][0].op_type == "Mul" and uses[0][0].domain == "":
        scaled = uses[0][0]
        other = scaled.inputs[1 - uses[0][1]]
        values = constant_of(other)
        if values is not None and values.shape == (shape[-1],):
            old, gain = scaled.outputs[0], other
    emit = Emitter(model, old, "rms")
    gain = emit.constant(np.ones(shape[-1])) if gain is None else gain
    written = emit.op("RMSNormalization", x, gain, axis=-1, epsilon=found.epsilon)
    written.shape, written.type = old.shape, old.type
    emit.replace(written)
    return True
