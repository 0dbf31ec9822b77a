"""The affine of a BatchNorm in numbers, where a rule depends on them, and what that decided."""

from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor, nn

from normswap.graph.norm_modules import formula

# Taking y = gamma n + beta back to n subtracts beta, whose rounding error beside n is then
# beta / gamma times as large.
_LARGEST_SHIFT = 8.0
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class ScaleShift:
    """The affine y = scale * x + shift of a BatchNorm with fixed statistics.

    Attributes:
        scale, shift: (C,), float64.
        invertible: taking it back does not amplify rounding errors much.
        cancels: how many times as large as its result are the numbers that cancel in s x + t.
    """

    scale: Tensor
    shift: Tensor
    invertible: bool
    cancels: float = 0.0

    def with_another(
        self,
        other: "ScaleShift",
        channels: Tensor,
        *,
        before: bool,
        inverse: bool,
        times: float | tuple[float, ...],
        offset: float | tuple[float, ...] = 0.0,
    ) -> "ScaleShift":
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
        cancels = max(self.cancels, 1.0) * max(other.cancels, 1.0)
        return ScaleShift(scale, shift, self.invertible and other.invertible, cancels)


@dataclass(frozen=True)
class Conditions:
    """What has to hold of an affine's numbers, because a plan was decided by them.

    Attributes:
        positive: the channels whose scale is above 0; a maximum commutes with no other.
        no_shift: every shift is 0, as it has no place to go.
        same_shift: sets of channels with one shift each, which a normalization does not see; -1
            stands for a value without the affine, whose shift is 0.
        invertible: taking the affine back does not amplify rounding errors much.
        constants: parameters and buffers of the model, by name, whose numbers were used, each with
            the digest of these.
    """

    positive: tuple[int, ...] = ()
    no_shift: bool = False
    same_shift: tuple[tuple[int, ...], ...] = ()
    invertible: bool = False
    constants: tuple[tuple[str, str], ...] = ()

    def broken_by(self, numbers: ScaleShift) -> str | None:
        """Which of these does not hold for `numbers`; None if all do."""
        if self.positive and not bool((numbers.scale[list(self.positive)] > 0).all()):
            return "its scale is not positive any more, and a maximum lies behind it"
        if self.no_shift and bool(numbers.shift.any()):
            return "it has a shift now, which has no place to go"
        padded = torch.cat([numbers.shift, numbers.shift.new_zeros(1)])
        if any((padded[list(each)] != padded[each[0]]).any() for each in self.same_shift):
            return "its shifts differ now, and the normalization behind it would see that"
        if self.invertible and not numbers.invertible:
            return "taking its affine back would amplify rounding errors now"
        return None


def digest_of(tensor: Tensor) -> str:
    """What tells the numbers of a tensor from others."""
    return sha256(tensor.detach().double().cpu().contiguous().numpy().tobytes()).hexdigest()


def numbers_of(norm: nn.Module) -> ScaleShift | None:
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
        cancels = (mean * scale).abs() / (gain.abs() + bias.abs()).clamp(min=_TINY)
        well = (bias.abs() <= _LARGEST_SHIFT * gain.abs()) & (scale != 0) & scale.isfinite()
        return ScaleShift(scale, bias - mean * scale, bool(well.all()), float(cancels.max()))


def _float64(
    norm: nn.Module, name: str | None, default: float, like: Tensor | None = None
) -> Tensor:
    """The tensor `name` of `norm`, (C,); without one as many of the default as `like` has."""
    if name is None:
        assert like is not None
        return torch.full_like(like, default)
    tensor: Tensor = getattr(norm, name)
    return tensor.double().flatten()
