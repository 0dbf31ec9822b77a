"""No normalization: the affine of the original goes with it."""

from torch import nn

from normswap.norms.registry import register


def _identity(num_features: int, *, eps: float = 0.0, affine: bool = False) -> nn.Module:
    return nn.Identity()


register(
    "identity",
    _identity,
    keeps="calibrated",
    summary="no normalization; the affine of the original is dropped",
    formula="x",
    statistics="none",
    cost="none",
)
