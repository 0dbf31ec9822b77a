"""Weight standardization: each unit's weights with mean 0 and variance 1.

Qiao et al. 2019 (arXiv 1903.10520), with N the number of weights of a unit (its fan-in):

    W' = (W - mu) / sqrt(var + eps)

Scaled, Brock et al. 2021 (arXiv 2101.08692, and 2102.06171, eq. 1), where gamma undoes what the
activation after it does to the variance (sqrt(2 / (1 - 1 / pi)) for ReLU):

    W' = gain gamma (W - mu) / sqrt(max(N var, eps))

The papers train from scratch. So that a trained weight can be given either, both have here a gain
per unit, as the scaled form has in its paper, and an offset per unit, added at the end, which start
at the deviation and the mean of the weight and keep it. With a gain alone the scaled form is that
of its paper; with neither the first is that of its own, and what a gain makes of it is Centered
Weight Normalization (Huang et al. 2017), for a gain sqrt(N) times smaller.

Centered weights: their mean over the output units, or within each unit, is 0.

Over the output units (dim 0): W' = W - mean over the units. The outputs of the layer, with a bias
centered likewise, then have mean 0 over their features, so that an RMSNorm after it is the
LayerNorm that it was (Jiang et al. 2023, arXiv 2305.14858, section 3).

Within each unit (dim 1): the incoming weights of a unit have mean 0, the first step of Centered
Weight Normalization (Huang et al. 2017, ICCV).

Either changes a weight that is not centered, by its definition; what is after a LayerNorm does not
see the first.
"""

from typing import Any

import torch
from torch import Tensor, nn

from normswap.core.errors import NormswapError
from normswap.norms.kernels import per_channel, statistics_dtype
from normswap.norms.moments import moments, normalize
from normswap.norms.registry import register
from normswap.norms.weight.units import Units, units_of


class WeightStandardization(nn.Module):
    """W' = gain (W - mu) / sqrt(var + eps) + offset for each unit.

    The originals are the gain, W and the offset, those there are, in this order.

    Args:
        units: what has a mean and a variance of its own.
        eps: added to the variance.
        gain: whether there is a gain; without one a weight is not kept.
        offset: whether there is an offset; without one the mean of a weight is not kept.
    """

    def __init__(
        self,
        units: Units = Units(),  # noqa: B008 - frozen
        eps: float = 1e-5,
        *,
        gain: bool = True,
        offset: bool = True,
    ) -> None:
        super().__init__()
        self.units, self.eps, self.gain, self.offset = units, eps, gain, offset

    def forward(self, *originals: Tensor) -> Tensor:
        weight = originals[1 if self.gain else 0]
        split = self.units.split(weight)

        def mix(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
            scale = self.inverse_deviation(var, split[0, 0].numel())
            if self.gain:
                scale = scale * self.units.split(originals[0]).reshape(var.shape)
            if self.offset:
                return scale, self.units.split(originals[-1]).reshape(var.shape)
            return scale, torch.zeros_like(mean)

        return self.units.join(normalize(split, mix))

    def right_inverse(self, weight: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The originals; those per unit have the shape of the weight with 1 on its other axes."""
        split = self.units.split(weight)
        mean, var = moments(split)
        gain = 1 / self.inverse_deviation(var, split[0, 0].numel())
        gain, offset = (
            self.units.join(per_channel(each, split)).to(weight.dtype) for each in (gain, mean)
        )
        originals = (gain,) * self.gain + (weight,) + (offset,) * self.offset
        return originals if len(originals) > 1 else weight

    def inverse_deviation(self, var: Tensor, fan_in: int) -> Tensor:
        """What W - mu is multiplied by, (groups, units)."""
        return torch.rsqrt(var + self.eps)


class ScaledWeightStandardization(WeightStandardization):
    """W' = gain gamma (W - mu) / sqrt(max(N var, eps)) + offset for each unit of N weights.

    Args:
        eps: N var is at least this.
        gamma: the constant of the activation that follows.
        units, gain, offset: as for WeightStandardization.
    """

    def __init__(
        self,
        units: Units = Units(),  # noqa: B008 - frozen
        eps: float = 1e-4,
        *,
        gamma: float = 1.0,
        gain: bool = True,
        offset: bool = True,
    ) -> None:
        super().__init__(units, eps, gain=gain, offset=offset)
        self.gamma = gamma

    def inverse_deviation(self, var: Tensor, fan_in: int) -> Tensor:
        return self.gamma * torch.rsqrt((fan_in * var).clamp(min=self.eps))


def _units(module: nn.Module, name: str) -> Units:
    units = units_of(module, name)
    if units.split(getattr(module, name))[0, 0].numel() < 2:
        raise NormswapError(f"each unit of {name} is a single weight, which would be erased")
    return units


def _weight_standardization(
    module: nn.Module, name: str, *, eps: float = 1e-5, gain: bool = True, offset: bool = True
) -> nn.Module:
    return WeightStandardization(_units(module, name), eps, gain=gain, offset=offset)


def _scaled_weight_standardization(
    module: nn.Module,
    name: str,
    *,
    eps: float = 1e-4,
    gamma: float = 1.0,
    gain: bool = True,
    offset: bool = True,
) -> nn.Module:
    if gamma <= 0:
        raise NormswapError(f"gamma must be positive, not {gamma}")
    units = _units(module, name)
    return ScaledWeightStandardization(units, eps, gamma=gamma, gain=gain, offset=offset)


_FACTS: dict[str, Any] = {
    "kind": "weight",
    "keeps": "exact",
    "statistics": "weight",
    "cost": "2 passes over the weight",
}
register(
    "weight_standardization",
    _weight_standardization,
    summary="mean 0 and variance 1 of each unit's weights, then a gain and an offset",
    source="Qiao et al. 2019, arXiv 1903.10520",
    formula="gain (W - E[W]) / sqrt(Var[W] + eps) + offset",
    **_FACTS,
)
register(
    "scaled_weight_standardization",
    _scaled_weight_standardization,
    summary="weight standardization that keeps the variance of what passes through",
    source="Brock et al. 2021, arXiv 2101.08692",
    formula="gain gamma (W - E[W]) / sqrt(max(N Var[W], eps)) + offset, N: the fan-in",
    **_FACTS,
)


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
