"""One scale and one shift per channel: what is left of a BatchNorm whose statistics are fixed.

The method `identity` is no normalization at all: the affine of the original goes with it.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from normswap.norms import kernels
from normswap.norms.registry import register


class ChannelAffine(nn.Module):
    """y = weight * x + bias, per channel (axis 1).

    One pass over memory. It holds two numbers per channel, half of a BatchNorm's four.

    Args:
        num_features: C.

    Shape:
        (N, C, ...) -> (N, C, ...)
    """

    norm_kind = "affine"

    def __init__(self, num_features: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.num_features = num_features
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            if isinstance(cast(Any, input), fx.Proxy):  # whose rank is not known
                return (input.movedim(1, -1) * self.weight + self.bias).movedim(-1, 1)
            if input.is_contiguous() and not kernels.recording():
                # The fastest kernel there is for it, twice the speed of multiplying and adding.
                mean, variance = torch.zeros_like(self.bias), torch.ones_like(self.weight)
                return F.batch_norm(input, mean, variance, self.weight, self.bias, eps=0.0)
        # Whatever is recorded (exported, compiled, traced) holds no batch normalization.
        shape = [-1] + [1] * (input.dim() - 2)
        y = input * self.weight.view(shape) + self.bias.view(shape)
        return y if y.dtype == input.dtype else y.to(input.dtype)

    def extra_repr(self) -> str:
        return str(self.num_features)


class ChannelShift(nn.Module):
    """y = x + bias, per channel (axis 1): what is left of a BatchNorm whose scale is in a weight.

    Args:
        num_features: C.

    Shape:
        (N, C, ...) -> (N, C, ...)
    """

    def __init__(self, num_features: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.num_features = num_features
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        scripting = torch.jit.is_scripting()  # type: ignore[attr-defined]
        if not scripting and isinstance(cast(Any, input), fx.Proxy):  # whose rank is not known
            return (input.movedim(1, -1) + self.bias).movedim(-1, 1)
        y = input + self.bias.view([-1] + [1] * (input.dim() - 2))
        return y if y.dtype == input.dtype else y.to(input.dtype)

    def extra_repr(self) -> str:
        return str(self.num_features)


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
