"""Global response normalization: channels compete by their norms over all positions.

Woo et al. 2023 (arXiv 2301.00808), section 3.2: with G the norm of each channel over the positions,

    N = G / (mean of G over the channels + eps),    y = weight * (x * N) + bias + x.

The paper adds it to a network, starting from the identity: weight and bias are 0. In the place of a
normalization the residual x would stay unnormalized and could not be fitted, so a swap leaves it
out: y = weight * (x * N) + bias.
"""

from functools import partial

import torch
from torch import Tensor, nn

from normswap.norms.channels import AffineNorm, check_channels, with_affine
from normswap.norms.registry import register, values_over_all
from normswap.norms.sample.mean_square import rescale


class GlobalResponseNorm(AffineNorm):
    """Global response normalization of (N, C, ...), rank >= 2.

    Args:
        num_features: C.
        eps: added to the mean of the norms.
        affine: have `weight` and `bias`, (C,).
        residual: add x, with weight and bias starting at 0; else weight starts at 1.
    """

    norm_kind = "global_response"

    def __init__(
        self, num_features: int, eps: float = 1e-6, affine: bool = True, *, residual: bool = True
    ) -> None:
        super().__init__(num_features)
        self.eps = eps
        self.residual = residual
        self.add_affine(affine, gain=0.0 if residual else 1.0)

    def forward(self, input: Tensor) -> Tensor:
        check_channels(input, self.num_features)
        return rescale(input, partial(self._mix, positions=input.shape[2:].numel()))

    def _mix(self, square: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        # The norm of a channel of zeros has no derivative; clamped, it is taken as 0.
        norm = (square * positions).clamp(min=torch.finfo(square.dtype).tiny).sqrt()
        scale, shift = with_affine(self, norm / (norm.mean(1, keepdim=True) + self.eps))
        return (scale + 1 if self.residual else scale), shift

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, residual={self.residual}"


def _adopt(new: nn.Module, old: nn.Module) -> None:
    """Make it the BatchNorm's function on samples whose norms are as the running statistics say.

    N scales the channels among each other but not as a whole, so the gain takes over what the
    running variance did.
    """
    mean, var = getattr(old, "running_mean", None), getattr(old, "running_var", None)
    assert isinstance(new, GlobalResponseNorm)
    if new.residual or new.weight is None or new.bias is None or mean is None or var is None:
        return
    size = (var + mean.square()).sqrt()
    share = (size / (size.mean() + new.eps)).clamp(min=1e-3)  # a dead channel has none
    gain = new.weight / (var + old.eps).sqrt()
    new.bias.sub_(gain * mean)
    new.weight.copy_(gain / share)


register(
    "global_response_norm",
    GlobalResponseNorm,
    keeps="calibrated",
    summary="per sample, channels by their share of the norm; a swap leaves its residual out",
    source="Woo et al. 2023, arXiv 2301.00808",
    formula="gamma x N + beta + x, N = |x_c| / (E_c[|x_c|] + eps), |x_c| over the positions",
    cost="2 passes",
    values=values_over_all,
    adopt=_adopt,
    swap={"residual": False},
)
