"""The table of operators: one row for each, which says all that normswap knows of it.

    operator        what a row is, and how it is looked up; what looks at shapes alone
    rule            what a rule is: how a scale and a shift of each channel go through an operator
    layout          which channel each element of a value belongs to
    moving          operators that only move elements pass an affine to where they move it
    pointwise       dropout, casts, sums and products
    functions       functions of each element, softmax
    rows            rows that an index picks, or that are added up, where the channels lie elsewhere
    windows         means, maxima and resizing over other axes than the channels'
    weights         convolutions, matrices and embeddings fold it in
    contractions    matmul and einsum: a constant folds it in, and what shares its axis passes it
    attention       products that mix positions pass it
    normalizations  those by the statistics of the sample fold it in after, and drop shifts

Whatever asks about operators asks this table: propagation, merging of branches, boundaries of
blocks, functional calls. A new operator is one row in one of these files. One that has no row, or
none with a rule, stops an affine, and its name is the reason in the plan.
"""

from normswap.graph.operators import (  # noqa: F401  # they define the rows
    attention,
    contractions,
    functions,
    moving,
    normalizations,
    pointwise,
    rows,
    weights,
    windows,
)
from normswap.graph.operators.operator import Operator, is_a, operator_of

__all__ = ["Operator", "is_a", "operator_of"]
