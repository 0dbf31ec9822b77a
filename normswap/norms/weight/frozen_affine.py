"""The affine of a frozen BatchNorm as a parametrization of the weight and bias before it.

With y = s * z + t the affine of the BatchNorm and z = W x + b the operator before it,

    y = (s W) x + (s b + t),

so the pair W' = s W, b' = s b + t computes both, and s and t still depend on gamma and beta: the
gradients of W, b, gamma and beta are those of the two modules in eval mode ("tune mode", Jiang et
al. 2023, arXiv 2305.11624). Baked, it is a fold.

Registering one changes the tensor, on purpose, at the moment when the BatchNorm stops computing;
there is therefore no right_inverse that would keep the tensor as it was.
"""

import torch
from torch import Tensor, nn

from normswap.norms.batch.frozen import scale_and_shift


class FrozenAffineWeight(nn.Module):
    """W' = s W, with s along the output channels of W.

    Args:
        norm: the frozen BatchNorm. It is referred to, not owned: its parameters stay where they
            are, under their names.
        groups: 0 where output channels are axis 0 of W; else W is that of a transposed conv,
            (C_in, C_out / groups, ...).
    """

    norm: nn.Module

    def __init__(self, norm: nn.Module, groups: int = 0) -> None:
        super().__init__()
        vars(self)["norm"] = norm
        self.groups = groups

    def forward(self, weight: Tensor) -> Tensor:
        scale, _ = scale_and_shift(self.norm, _precision(weight))
        if self.groups:
            # (groups, C_in / groups, C_out / groups, ...): each group has its own output channels.
            grouped = weight.to(scale.dtype).view(self.groups, -1, *weight.shape[1:])
            scale = scale.view(self.groups, 1, -1, *[1] * (weight.dim() - 2))
            return (grouped * scale).view_as(weight).to(weight.dtype)
        scale = scale.view(-1, *[1] * (weight.dim() - 1))
        return (weight.to(scale.dtype) * scale).to(weight.dtype)


class FrozenAffineBias(nn.Module):
    """b' = s b + t.

    Args:
        norm: as in `FrozenAffineWeight`.
        given: b is a zero that was added to make room, and goes when this does.
    """

    norm: nn.Module

    def __init__(self, norm: nn.Module, given: bool = False) -> None:
        super().__init__()
        vars(self)["norm"] = norm
        self.given = given

    def forward(self, bias: Tensor) -> Tensor:
        scale, shift = scale_and_shift(self.norm, _precision(bias))
        return (bias.to(scale.dtype) * scale + shift).to(bias.dtype)


def _precision(tensor: Tensor) -> torch.dtype:
    # Without gradients the result is kept (a fold), so it is worth a single rounding. In training,
    # float64 copies of every weight would cost the memory that tune mode is for.
    return (
        torch.promote_types(tensor.dtype, torch.float32)
        if torch.is_grad_enabled()
        else torch.float64
    )
