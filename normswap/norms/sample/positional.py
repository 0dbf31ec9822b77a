"""Positional normalization: mean and variance over the channels of each position.

Li et al. 2019 (arXiv 1907.04312), equations 1 and 2. That is LayerNorm over the channels of each
position, and the paper's gives no gain and bias of its own: it carries the mean and deviation it
takes away to a later layer, which a model that has no such layer cannot use.
"""

from torch import nn

from normswap.norms.registry import register
from normswap.norms.sample.group import LayerNormPerPosition


def _positional_norm(num_features: int, *, eps: float = 1e-5, affine: bool = False) -> nn.Module:
    return LayerNormPerPosition(num_features, eps=eps, affine=affine)


register(
    "positional_norm",
    _positional_norm,
    keeps="calibrated",
    summary="per sample and position, over the channels",
    source="Li et al. 2019, arXiv 1907.04312",
    formula="(x - E_p[x]) / sqrt(Var_p[x] + eps), p: the channels of a position",
    cost="2 passes",
    values=lambda channels, positions, options: channels,
)
