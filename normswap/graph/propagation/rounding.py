"""Whether a tensor can fold in an affine in its own dtype.

A fold is exact in real numbers. In those of a dtype it is as good as the original where two things
hold:

- *Range.* What folds in the affine stays finite, and no channel of it becomes so small that digits
  are lost. float16 ends at 65504, and below 6e-5 it loses digits.
- *Cancellation.* BatchNorm subtracts the mean first. In s x + t the large numbers s x and t cancel
  instead, and what was rounded in them stays. They are |s mean| / (|gamma| + |beta|) times as large
  as what is left (`ScaleShift.cancels`). This concerns the operators after a BatchNorm, and a scale
  and shift in its place. One before it computes (s W) x + (s b + t): it adds in its bias what the
  BatchNorm subtracted from its output, so nothing cancels that did not before.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from normswap.graph.operators.rule import ChannelIndex
from normswap.graph.propagation.scale_shift import Multiple, ScaleShift

Role = Literal["weight", "bias", "input_bias", "value"]
# How many times as large as the result the numbers that cancel may be. In float16 and bfloat16 that
# is how many times as large the error gets. The others have digits to spare: the error stays below
# 1e-5 in float32 and 1e-10 in float64, summed over some thousand inputs.
_LARGEST_CANCELLATION: Mapping[torch.dtype, float] = {
    torch.float64: 4096.0,
    torch.float32: 32.0,
    torch.float16: 8.0,
    torch.bfloat16: 8.0,
}


@dataclass(frozen=True)
class Taking:
    """How one tensor folds in an affine; `passes.edits.FoldIntoTensor` explains the arguments.

    Attributes:
        numbers: the affine.
        role: what the tensor is.
        channel_index: where the channels lie in the tensor, or for an "input_bias" in the weight.
        times: how often the shift comes in, or how often that of each channel does.
        offset: how often the scale less 1 comes in, too.
        inverse: the affine is taken back.
    """

    numbers: ScaleShift
    role: Role
    channel_index: ChannelIndex
    times: Multiple = 1.0
    offset: Multiple = 0.0
    inverse: bool = False

    def why_not(self, tensor: Tensor, weight: Tensor | None = None) -> str | None:
        """Why `tensor` cannot fold in the affine in its dtype; None where it can.

        Args:
            weight: that beside an "input_bias".
        """
        if tensor.is_meta or not tensor.numel() or not bool(tensor.isfinite().all()):
            return None
        if self.role == "weight":
            return self._weight_why_not(tensor)
        cancels = self.role == "input_bias" and not self.inverse
        why = cancels_too_much(self.numbers, tensor.dtype) if cancels else None
        largest = float(self.folds(tensor, weight).abs().max())
        if why is None and not largest <= torch.finfo(tensor.dtype).max:
            why = f"a shift of {largest:.2g} does not fit into {_name(tensor.dtype)}"
        return why

    def folds(self, tensor: Tensor, weight: Tensor | None = None) -> Tensor:
        """What `tensor` is with the affine, in float64."""
        scale, shift = self._in_slots(tensor.device)
        if self.role == "input_bias":
            assert weight is not None
            added = weight.double().view(self.channel_index.view or weight.shape) * shift
            added = added.sum(self.channel_index.over) if self.channel_index.over else added
            return tensor.double() + added.reshape(tensor.shape)
        taken = tensor.double().view(self.channel_index.view or tensor.shape) * scale
        return (taken if self.role == "weight" else taken + shift).view(tensor.shape)

    def _weight_why_not(self, weight: Tensor) -> str | None:
        limits, (scale, _) = torch.finfo(weight.dtype), self._in_slots(weight.device)
        seen = weight.detach().view(self.channel_index.view or weight.shape)
        shape = (1,) * (seen.dim() - scale.dim()) + tuple(scale.shape)
        # Of a channel the largest weight says it all: what is small beside it does not count.
        over = [axis for axis, size in enumerate(shape) if size == 1]
        largest = (seen.abs().amax(over, keepdim=True) if over else seen.abs()).double()
        taken = largest * scale.abs()
        if not bool((taken <= limits.max).all()):
            return f"a weight of {float(taken.max()):.2g} does not fit into {_name(weight.dtype)}"
        lost = (taken < limits.smallest_normal) & (taken < largest) & (taken > 0)
        if bool(lost.any()):
            smallest = float(taken[lost].min())
            return f"weights of {smallest:.2g} lose digits in {_name(weight.dtype)}"
        return None

    def _in_slots(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Scale and shift of every slot, in the shape of the channel_index."""
        scale, shift = self.numbers.scale.to(device), self.numbers.shift.to(device)
        shift = shift * shift.new_tensor(self.times)
        shift = shift + (scale - 1) * shift.new_tensor(self.offset)
        if self.inverse:
            scale, shift = 1 / scale, -shift / scale
        if self.channel_index.channels is None:
            count = prod(self.channel_index.shape)
            scale, shift = scale[:count], shift[:count]
        else:  # one past the last is for channel_index without a channel
            index = torch.tensor(self.channel_index.channels, device=device)
            scale = torch.cat([scale, scale.new_ones(1)])[index]
            shift = torch.cat([shift, shift.new_zeros(1)])[index]
        return scale.view(self.channel_index.shape), shift.view(self.channel_index.shape)


def affine_why_not(numbers: ScaleShift, dtype: torch.dtype) -> str | None:
    """Why a scale and shift per channel in `dtype` cannot compute it; None where they can."""
    ones, channel_index = (
        torch.ones_like(numbers.scale, dtype=dtype),
        ChannelIndex(tuple(numbers.scale.shape)),
    )
    scale = Taking(numbers, "weight", channel_index).why_not(ones)
    shift = Taking(numbers, "bias", channel_index).why_not(torch.zeros_like(ones))
    return cancels_too_much(numbers, dtype) or scale or shift


def cancels_too_much(numbers: ScaleShift, dtype: torch.dtype) -> str | None:
    """Why s x + t is not to be computed in `dtype`; None where it is harmless."""
    if numbers.cancels <= _LARGEST_CANCELLATION.get(dtype, 8.0):
        return None
    return (
        f"its mean is {numbers.cancels:.2g} times as large as what it leaves, and in "
        f"{_name(dtype)} a shift that is added later loses digits"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
