"""Centered weights: their mean over the output units, or within each unit, is 0.

Over the output units (dim 0): W' = W - mean over the units. The outputs of the layer, with a bias
centered likewise, then have mean 0 over their features, so that an RMSNorm after it is the
LayerNorm that it was (Jiang et al. 2023, arXiv 2305.14858, section 3).

Within each unit (dim 1): the incoming weights of a unit have mean 0, the first step of Centered
Weight Normalization (Huang et al. 2017, ICCV).

Either changes a weight that is not centered, by its definition; what is after a LayerNorm does not
see the first.
"""

from torch import Tensor, nn

from normswap.core.errors import NormswapError
from normswap.norms.kernels import statistics_dtype
from normswap.norms.registry import register
from normswap.norms.weight.units import Units, units_of


class CenteredWeight(nn.Module):
    """W' = W - mean(W).

    Args:
        units: where the output units of the weight lie.
        dim: 0: the mean over the units; 1: that of each.
    """

    def __init__(self, units: Units = Units(), dim: int = 0) -> None:  # noqa: B008 - frozen
        super().__init__()
        self.units, self.dim = units, dim

    def forward(self, weight: Tensor) -> Tensor:
        split = self.units.split(weight)
        over = (1,) if self.dim == 0 else tuple(range(2, split.dim()))
        mean = split.mean(over, keepdim=True, dtype=statistics_dtype(weight))
        return self.units.join(split - mean).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


def _build(module: nn.Module, name: str, *, dim: int = 0) -> nn.Module:
    if dim not in (0, 1):
        raise NormswapError(f"dim is 0 (over the output units) or 1 (within each), not {dim}")
    if dim == 1:
        return CenteredWeight(units_of(module, name), dim)
    if getattr(module, "groups", 1) > 1:
        raise NormswapError(
            "the outputs of a grouped convolution are not centered by its weight; "
            "exclude it, or center each unit with dim=1"
        )
    bias = getattr(module, name).dim() == 1
    return CenteredWeight(Units() if bias else units_of(module, name), dim)


register(
    "centered_weight",
    _build,
    kind="weight",
    keeps="calibrated",
    summary="takes the mean over the output units off the weight, unseen by a LayerNorm after it",
    source="Jiang et al. 2023, arXiv 2305.14858",
    formula="W - E[W], over the output units (dim 0) or within each (dim 1)",
    statistics="weight",
    cost="2 passes over the weight",
)
