"""The affine table: how a per-channel affine moves through each ATen operator.

    moving      operators that only move elements pass an affine to where they move it
    pointwise   dropout, casts, sums and products
    rows        rows that an index picks, or that are added up, where the channels lie elsewhere
    windows     means, maxima and resizing over other axes than the channels'
    weights     convolutions, matrices and embeddings absorb it
    contractions  matmul and einsum: a constant absorbs it, and what shares its axis passes it
    attention   products that mix positions pass it
    invariant   normalizations by the statistics of the sample absorb it after, and drop shifts

A new rule is one row in one of these. `rule` says what a rule is; an operator in none of them stops
an affine, and its name is the reason in the plan.
"""

from collections.abc import Mapping
from typing import Any

from torch import fx

from normswap.graph.affine.rules.attention import ATTENTION
from normswap.graph.affine.rules.contractions import CONTRACTIONS
from normswap.graph.affine.rules.invariant import NORMALIZATIONS
from normswap.graph.affine.rules.moving import MOVING, Moving
from normswap.graph.affine.rules.pointwise import HOMOGENEOUS, PRODUCTS, SAME, SUMS, Product, Sum
from normswap.graph.affine.rules.rows import ROWS
from normswap.graph.affine.rules.rule import Context, Rule
from normswap.graph.affine.rules.weights import WEIGHTED
from normswap.graph.affine.rules.windows import WINDOWS

RULES: Mapping[Any, Rule] = {
    **dict.fromkeys(MOVING, Moving()),
    **SAME,
    **dict.fromkeys(SUMS, Sum()),
    **dict.fromkeys(PRODUCTS, Product()),
    **WINDOWS,
    **ROWS,
    **WEIGHTED,
    **CONTRACTIONS,
    **ATTENTION,
    **NORMALIZATIONS,
}


def rule_of(node: fx.Node, context: Context) -> Rule | None:
    """The rule of the operator of `node`; None for one that stops an affine."""
    return RULES.get(node.target) or (HOMOGENEOUS.get(node.target) if context.scale_alone else None)
