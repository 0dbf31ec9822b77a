"""The affine of a BatchNorm in numbers, where a rule depends on them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

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
        self,
        other: "Numbers",
        channels: Tensor,
        *,
        before: bool,
        inverse: bool,
        times: float | tuple[float, ...],
        offset: float | tuple[float, ...] = 0.0,
    ) -> "Numbers":
        """This affine and `other` in one.

        Args:
            channels: (C,), for each channel the one of `other`, -1 for none.
            before: `other` comes first.
            inverse: `other` is taken back.
            times: how often its shift comes in.
            offset: how often its scale less 1 comes in as well.
        """
        m, n = (torch.as_tensor(each, dtype=torch.float64) for each in (times, offset))
        scale, shift = other.scale, other.shift * m + (other.scale - 1) * n
        if inverse:
            scale, shift = 1 / scale, -shift / scale
        scale = torch.cat([scale, scale.new_ones(1)])[channels]
        shift = torch.cat([shift, shift.new_zeros(1)])[channels]
        shift = self.scale * shift + self.shift if before else scale * self.shift + shift
        scale = scale * self.scale
        return Numbers(scale, shift, self.invertible and other.invertible)


def numbers_of(norm: nn.Module) -> Numbers | None:
    """The affine of `norm` in eval mode; None where its formula is not BatchNorm's, or on meta."""
    if hasattr(norm, "eval_affine"):
        return None
    with torch.no_grad():
        mean, variance = _float64(norm, "running_mean"), _float64(norm, "running_var")
        if mean is None or variance is None or mean.is_meta:
            return None
        gain, bias = _float64(norm, "weight"), _float64(norm, "bias")
        gain = torch.ones_like(mean) if gain is None else gain
        bias = torch.zeros_like(mean) if bias is None else bias
        scale = gain * torch.rsqrt(variance + float(norm.eps))  # type: ignore[arg-type]
        well = (bias.abs() <= _LARGEST_SHIFT * gain.abs()) & (scale != 0) & scale.isfinite()
        return Numbers(scale, bias - mean * scale, bool(well.all()))


def _float64(norm: nn.Module, name: str) -> Tensor | None:
    tensor = getattr(norm, name, None)
    return tensor.double() if isinstance(tensor, Tensor) else None
