"""The affine of a BatchNorm in numbers, where a rule depends on them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normswap.graph.norm_modules import formula

# Taking y = gamma n + beta back to n subtracts beta, whose rounding error beside n is then
# beta / gamma times as large.
_LARGEST_SHIFT = 8.0


@dataclass(frozen=True)
class Numbers:
    """The affine y = scale * x + shift of a BatchNorm with fixed statistics.

    Attributes:
        scale, shift: (C,), float64.
        invertible: taking it back does not amplify rounding errors much.
    """

    scale: Tensor
    shift: Tensor
    invertible: bool

    def with_another(
        self, other: "Numbers", channels: Tensor, *, before: bool, inverse: bool, times: float
    ) -> "Numbers":
        """This affine and `other` in one.

        Args:
            channels: (C,), for each channel the one of `other`, -1 for none.
            before: `other` comes first.
            inverse: `other` is taken back.
            times: how often its shift comes in.
        """
        scale, shift = other.scale, other.shift * times
        if inverse:
            scale, shift = 1 / scale, -shift / scale
        scale = torch.cat([scale, scale.new_ones(1)])[channels]
        shift = torch.cat([shift, shift.new_zeros(1)])[channels]
        shift = self.scale * shift + self.shift if before else scale * self.shift + shift
        scale = scale * self.scale
        return Numbers(scale, shift, self.invertible and other.invertible)


def numbers_of(norm: nn.Module) -> Numbers | None:
    """The affine of `norm` in eval mode; None where its formula is not BatchNorm's, or on meta."""
    found = None if hasattr(norm, "eval_affine") else formula(norm)
    if found is None or found.variance is None:
        return None
    with torch.no_grad():
        variance = _float64(norm, found.variance, 1.0)
        if variance.is_meta:
            return None
        mean, bias = (_float64(norm, name, 0.0, variance) for name in (found.mean, found.bias))
        gain = _float64(norm, found.gain, 1.0 - found.gain_offset, variance) + found.gain_offset
        scale = gain * torch.rsqrt(variance + found.eps)
        well = (bias.abs() <= _LARGEST_SHIFT * gain.abs()) & (scale != 0) & scale.isfinite()
        return Numbers(scale, bias - mean * scale, bool(well.all()))


def _float64(
    norm: nn.Module, name: str | None, default: float, like: Tensor | None = None
) -> Tensor:
    """The tensor `name` of `norm`, (C,); without one as many of the default as `like` has."""
    if name is None:
        assert like is not None
        return torch.full_like(like, default)
    tensor: Tensor = getattr(norm, name)
    return tensor.double().flatten()
