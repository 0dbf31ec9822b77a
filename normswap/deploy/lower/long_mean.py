"""The rule `LongMean`: the mean of an InstanceNormalization over many values, to all its digits.

ONNX Runtime's InstanceNormalization sums a row one value after the other in float32. The mean of
n values is then off by up to n / 40 roundings (measured with 1.31), and a blank image, whose
deviation is 0, comes out as that error times 1 / sqrt(eps): 0.13 for 64x56x56 values of 2.1, where
torch has 0. In rows of LONG values and more

- a normalization without gain and bias (what torch's exporter writes for GroupNorm) becomes a
  LayerNormalization, whose mean is exact and which takes as long, where opset and sizes allow it;
- every other one gets its input with the mean taken off, so that it has only the rest to take off.
"""

import numpy as np
import onnx_ir as ir

from normswap.deploy.lower.emit import Emitter, NodeRule, constant_of, known, sizes

# Below, the error is within the `diverge.ROUNDINGS` that two correct implementations may differ by.
LONG = 1024
_FIRST_LAYER_NORMALIZATION = 17
_FIRST_AXES_AS_INPUT = 18


class LongMean(NodeRule):
    """As this module says.

    The ones that a LayerNormalization takes as its gain are expanded in the graph, which takes no
    room in the file, or an initializer, which some runtimes ask for.
    """

    def __init__(self, *, gain_as_initializer: bool = False) -> None:
        super().__init__()
        self._gain_as_initializer = gain_as_initializer

    def rewrite(self, model: ir.Model, node: ir.Node) -> bool:
        if node.op_type != "InstanceNormalization" or node.domain != "":
            return False
        x, gain, bias = node.inputs
        shape = sizes(x) if x is not None else None
        if x is None or gain is None or bias is None or shape is None:
            return False
        length, opset = known(shape[2:]), model.opset_imports[""]
        if length is not None and length < LONG:
            return False
        emit = Emitter(model, node.outputs[0], "mean")
        epsilon = node.attributes.get_float("epsilon", 1e-5)
        plain = len(shape) == 3 and _all(gain, 1) and _all(bias, 0)
        if plain and length is not None and opset >= _FIRST_LAYER_NORMALIZATION:
            if self._gain_as_initializer:
                ones = emit.constant(np.ones(length))
            else:
                ones = emit.op("Expand", emit.constant([1]), emit.shape(length))
            emit.replace(emit.op("LayerNormalization", x, ones, axis=-1, epsilon=epsilon))
            return True
        axes = list(range(2, len(shape)))
        if opset >= _FIRST_AXES_AS_INPUT:
            mean = emit.op("ReduceMean", x, emit.shape(*axes))
        else:
            mean = emit.op("ReduceMean", x, axes=axes)
        rest = emit.op("Sub", x, mean)
        emit.replace(emit.op("InstanceNormalization", rest, gain, bias, epsilon=epsilon))
        return True


def _all(value: ir.Value, number: int) -> bool:
    values = constant_of(value)
    return values is not None and bool(np.all(values == number))
