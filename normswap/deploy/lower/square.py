"""The rule `MeanSquare`: means of squares and variances over positions, as dot products.

The methods that are built on moments are exported as

    ReduceMean of Pow(x, 2)                     the mean square
    ReduceMean of Pow(x - ReduceMean(x), 2)     the variance

over the positions of x, of shape (N, C, ...), or over the channels as well. Two or four passes over
memory become one or two (`dots.py`). The rule requires float32, known sizes behind the batch, the
axes from 1 or 2 to the last, and LARGE elements in a sample.
"""

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import get_const_tensor

from normswap.deploy.lower.dots import sum_and_squares, sum_of_squared_deviations
from normswap.deploy.lower.emit import Emitter, NodeRule, constant_of, known, producer, sizes

LARGE = 100_000  # elements in a sample, below which more and smaller operators do not pay


class MeanSquare(NodeRule):
    """As this module says."""

    def rewrite(self, model: ir.Model, node: ir.Node) -> bool:
        if node.op_type != "ReduceMean" or node.domain != "":
            return False
        power = producer(node.inputs[0], "Pow")
        exponent = constant_of(power.inputs[1]) if power else None
        if power is None or power.inputs[0] is None or exponent is None or (exponent != 2).any():
            return False
        x = power.inputs[0]
        axes = _axes(node)
        centred = producer(x, "Sub")
        centre = producer(centred.inputs[1], "ReduceMean") if centred else None
        variance = (
            centre is not None and centred is not None and centre.inputs[0] is centred.inputs[0]
        )
        if variance and centre is not None and centre.inputs[0] is not None:
            if _axes(centre) != axes or not _keeps(centre):
                return False
            x = centre.inputs[0]
        shape = sizes(x)
        if shape is None or axes is None or len(shape) < 3:
            return False
        rank, elements = len(shape), known(shape[1:])
        first = rank - len(axes)
        if elements is None or elements < LARGE:
            return False
        if axes != list(range(first, rank)) or first not in (1, 2):
            return False
        channels = shape[1] or 1
        groups = channels if first == 2 else 1
        size = elements // groups
        emit = Emitter(model, node.outputs[0], "square")
        mean, squares = sum_and_squares(emit, x, groups, channels, size)
        total = sum_of_squared_deviations(emit, mean, squares, size) if variance else squares
        # One factor for each row, not one for all: ONNX Runtime would merge that into the product.
        factors = emit.constant(np.full((1, groups, 1, 1), 1 / size))
        mean_square = emit.op("Mul", total, factors)
        kept = [0, groups] if first == 2 else [0]
        ones = [1] * len(axes) if _keeps(node) else []
        emit.replace(emit.op("Reshape", mean_square, emit.shape(*kept, *ones)))
        return True


def _axes(node: ir.Node) -> list[int] | None:
    """The axes of a reduction, from the first one on."""
    given = node.inputs[1] if len(node.inputs) > 1 else None
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    axes = None if given is None else get_const_tensor(given)
    if axes is None or shape is None:
        return None
    return sorted(int(axis) % len(shape) for axis in axes.numpy().ravel())


def _keeps(node: ir.Node) -> bool:
    return bool(node.attributes.get_int("keepdims", 1))
