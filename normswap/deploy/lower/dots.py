"""Moments as dot products: what ONNX Runtime's matrix kernels sum in one fast pass.

A reduction by ReduceMean is fast in ONNX Runtime, one by ReduceSumSquare or a variance in the
normalizations is several times slower (measured with 1.31, two threads, 1x64x112x112: ReduceMean
0.03 ms, ReduceSumSquare 0.22, LayerNormalization 0.16). A row times itself transposed is a sum of
squares too, and takes 0.04. Not by MatMul with a constant factor behind it, though: the runtime
merges the two, and then takes a kernel that is ten times slower.
"""

import onnx_ir as ir

from normswap.deploy.lower.emit import MICROSOFT, Emitter

# Below so many rows, threads have too little to share: rows are then single channels.
FEW_ROWS = 8
# Sums of so many values and then of these sums: the roundings of one long sum, of equal values say,
# add up (`long_mean`). A matrix kernel has several sums, and a call of it costs more.
OF_MEAN, OF_SQUARES = 256, 4096


def sum_and_squares(
    emit: Emitter, x: ir.Value, groups: int, channels: int, size: int
) -> tuple[ir.Value, ir.Value]:
    """The mean and the sum of squares of each group of `x`, both of shape (N, groups, 1, 1).

    `x` has shape (N, C, ...), and `size` elements in a group of a sample.
    """
    rows = groups if groups >= FEW_ROWS else channels
    length = size * groups // rows
    parts = emit.op("Reshape", x, emit.shape(0, rows, -1, _part(length, OF_MEAN)))
    mean = emit.op("ReduceMean", parts, emit.shape(3), keepdims=1)
    mean = emit.op("ReduceMean", mean, emit.shape(2), keepdims=1)
    if rows != groups:
        mean = emit.op("Reshape", mean, emit.shape(0, groups, -1, 1))
        mean = emit.op("ReduceMean", mean, emit.shape(2), keepdims=1)
    rows *= length // _part(length, OF_SQUARES)
    view = emit.op("Reshape", x, emit.shape(0, rows, 1, -1))
    squares = emit.op("FusedMatMul", view, view, domain=MICROSOFT, transB=1)
    if rows != groups:
        squares = emit.op("Reshape", squares, emit.shape(0, groups, -1, 1))
        squares = emit.op("ReduceSum", squares, emit.shape(2), keepdims=1)
    return mean, squares


def _part(length: int, most: int) -> int:
    """Into what a row of this length is divided: at most so long, unless that makes too many."""
    part = max(n for n in range(1, min(length, most) + 1) if length % n == 0)
    return part if part * most >= length else length


def sum_of_squared_deviations(
    emit: Emitter, mean: ir.Value, squares: ir.Value, size: int
) -> ir.Value:
    """sum (x - mean)^2 = sum x^2 - size mean^2, of shape (N, groups, 1, 1), never negative.

    In float32 its error is a few roundings of the sum of squares, so that a mean of 100 standard
    deviations leaves three digits of the variance. LayerNormalization in ONNX Runtime, and torch on
    a GPU, compute it in the same way.
    """
    centre = emit.op("Mul", emit.op("Mul", mean, mean), emit.constant(size))
    return emit.op("Relu", emit.op("Sub", squares, centre))
