"""What the methods' modules share: channels at axis 1, and a gain and a bias for each."""

from typing import Any

import torch
from torch import Tensor, nn

from normswap.norms.kernels import statistics_dtype


class AffineNorm(nn.Module):
    """A normalization of (N, C, ...) of any rank >= 2 that may have a gain and a bias.

    Attributes:
        num_features: C.
        weight, bias: gamma and beta, (C,), or None; `add_affine` makes them.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def add_affine(self, affine: bool, *, gain: float = 1.0, bias: bool = True) -> None:
        """Give it a weight that starts at `gain`, and a bias of zeros; with `affine` False none."""
        for name, start, present in (("weight", gain, affine), ("bias", 0.0, affine and bias)):
            vector = nn.Parameter(torch.full((self.num_features,), start)) if present else None
            self.register_parameter(name, vector)

    def extra_repr(self) -> str:
        own = vars(self)
        named = [f"{name}={own[name]}" for name in ("eps", "momentum") if name in own]
        return ", ".join([str(self.num_features), *named, f"affine={self.weight is not None}"])


def gain_and_offset(norm: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """gamma and beta of a normalization, (C,), or 1 and 0 in the dtype of the statistics of x."""
    size, wide = norm.num_features, statistics_dtype(x)
    gain = x.new_ones(size, dtype=wide) if norm.weight is None else norm.weight
    return gain, x.new_zeros(size, dtype=wide) if norm.bias is None else norm.bias


def with_affine(norm: Any, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The scale times gamma, and beta as a shift: the end of a mix."""
    if norm.weight is not None:
        scale = scale * norm.weight
    return scale, torch.zeros_like(scale) if norm.bias is None else norm.bias


def check_rank(x: Tensor) -> None:
    """Raise ValueError unless x is (N, C, ...)."""
    if x.dim() < 2:
        raise ValueError(f"expected (N, C, ...), got a tensor of rank {x.dim()}")


def check_channels(x: Tensor, num_features: int) -> None:
    """Raise ValueError unless x is (N, C, ...) with C = `num_features`."""
    if x.dim() < 2 or x.shape[1] != num_features:
        raise ValueError(
            f"expected (N, {num_features}, ...), got {tuple(x.shape)}; channels go at axis 1"
        )
