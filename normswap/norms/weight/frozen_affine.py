"""The affine of a frozen BatchNorm as a parametrization of the weights around it.

With y = s * z + t the affine of the BatchNorm and z = W x + b the operator before it,

    y = (s W) x + (s b + t),

so the pair W' = s W, b' = s b + t computes both, and s and t still depend on gamma and beta: the
gradients of W, b, gamma and beta are those of the two modules in eval mode ("tune mode", Jiang et
al. 2023, arXiv 2305.11624). Baked, it is a fold. The operator after it folds in the same affine as

    W (s x + t) + b = (W s) x + (b + W t).

Registering one changes the tensor, on purpose, at the moment when the BatchNorm stops computing;
there is therefore no right_inverse that would keep the tensor as it was.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normswap.norms.batch.frozen import scale_and_shift

Multiple = float | tuple[float, ...]


class AffineParametrization(nn.Module):
    """What all of these know: the frozen BatchNorm, and where its channels lie in the tensor.

    Args:
        norm: the frozen BatchNorm. It is referred to, not owned: its parameters stay where they
            are, under their names.
        shape: scale[channels] is given this shape, which fits the tensor, or its `view`.
        channels: for each slot the channel of the BatchNorm, -1 for none; None for 0, 1, 2, ...
        view: the tensor is seen in this shape first (the groups of a convolution).
        inverse: fold in the inverse of the affine, x = (y - t) / s.
        shift: m, how often the shift comes in, or how often that of each channel does.
        offset: n; n (s - 1) is added to the shift.
    """

    norm: nn.Module
    channels: Tensor | None

    def __init__(
        self,
        norm: nn.Module,
        shape: tuple[int, ...],
        channels: tuple[int, ...] | None = None,
        view: tuple[int, ...] | None = None,
        *,
        inverse: bool = False,
        shift: Multiple = 1.0,
        offset: Multiple = 0.0,
    ) -> None:
        super().__init__()
        vars(self)["norm"] = norm
        self.shape, self.view, self.inverse = shape, view, inverse
        self.shift, self.offset = shift, offset
        index = None if channels is None else torch.tensor(channels)
        self.register_buffer("channels", index, persistent=False)

    def affine(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """s and t in the slots, in the precision to compute in."""
        scale, shift = scale_and_shift(self.norm, _precision(tensor))
        if self.shift != 1:
            shift = shift * shift.new_tensor(self.shift)
        if self.offset != 0:
            shift = shift + (scale - 1) * scale.new_tensor(self.offset)
        if self.inverse:
            scale, shift = 1 / scale, -shift / scale
        if self.channels is None:
            count = prod(self.shape)
            scale, shift = scale[:count], shift[:count]
        else:  # one past the last is for slots without a channel
            scale = torch.cat([scale, scale.new_ones(1)])[self.channels]
            shift = torch.cat([shift, shift.new_zeros(1)])[self.channels]
        return scale.view(self.shape), shift.view(self.shape)

    def seen(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor in the shape that fits the slots."""
        return tensor.to(dtype) if self.view is None else tensor.to(dtype).view(self.view)


class FrozenAffineWeight(AffineParametrization):
    """W' = s W, with s along the output or the input channels of W."""

    def forward(self, weight: Tensor) -> Tensor:
        scale, _ = self.affine(weight)
        if weight.numel() > _TILE and self.view is None and not torch.is_grad_enabled():
            return _scaled(weight, scale)
        return (self.seen(weight, scale.dtype) * scale).view_as(weight).to(weight.dtype)


class FrozenAffineBias(AffineParametrization):
    """b' = s b + m t: the bias of an operator before the BatchNorm, or a constant that is a value.

    Args:
        given: b is a zero that was added to make room, and goes when this does.
    """

    def __init__(self, *share: Any, given: bool = False, **affine: Any) -> None:
        super().__init__(*share, **affine)
        self.given = given

    def forward(self, bias: Tensor) -> Tensor:
        scale, shift = self.affine(bias)
        return (self.seen(bias, scale.dtype) * scale + shift).view_as(bias).to(bias.dtype)


class FrozenAffineInputBias(AffineParametrization):
    """b' = b + m W t: the bias of an operator after the BatchNorm.

    W is the weight before the scale was folded in, so this is registered after that, and baked
    before.

    Args:
        owner: the module whose weight it is.
        weight: its name.
        over: the axes of the weight's view to sum over.
    """

    owner: nn.Module

    def __init__(
        self,
        *share: Any,
        owner: nn.Module,
        weight: str,
        over: tuple[int, ...],
        given: bool = False,
        **affine: Any,
    ) -> None:
        super().__init__(*share, **affine)
        vars(self)["owner"] = owner
        self.weight, self.over, self.given = weight, over, given
        chain = _chain(owner, weight)
        own = [isinstance(each, AffineParametrization) and each.norm == self.norm for each in chain]
        self.before = len(own) - 1 - own[::-1].index(True)  # it may be on the output side too

    def forward(self, bias: Tensor) -> Tensor:
        _, shift = self.affine(bias)
        added = self.seen(self.weight_before(), shift.dtype) * shift
        if self.over:
            added = added.sum(self.over)
        return (bias.to(shift.dtype) + added.view_as(bias)).to(bias.dtype)

    def weight_before(self) -> Tensor:
        """The weight before it folded in the scale."""
        return _value_before(self.owner, self.weight, self.before)


_TILE = 2**20  # numbers that are computed in float64 at a time


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """scale * weight in the dtype of `weight`, computed a part at a time."""
    scale = scale.view((1,) * (weight.dim() - scale.dim()) + tuple(scale.shape))
    result, rows = torch.empty_like(weight), max(1, _TILE // weight[0].numel())
    for first in range(0, len(weight), rows):
        part = slice(first, first + rows)
        along = scale if scale.shape[0] == 1 else scale[part]
        result[part] = weight[part].to(scale.dtype) * along
    return result


def _chain(module: nn.Module, tensor: str) -> list[nn.Module]:
    if not parametrize.is_parametrized(module, tensor):
        return []
    return list(module.parametrizations[tensor])  # type: ignore[index]


def _value_before(module: nn.Module, tensor: str, count: int) -> Tensor:
    """The value of a tensor after the first `count` of its parametrizations."""
    if not parametrize.is_parametrized(module, tensor):
        value: Any = getattr(module, tensor)
    else:
        chain: Any = module.parametrizations[tensor]  # type: ignore[index]
        if chain.is_tensor:
            values = [chain.original]
        else:
            values = [getattr(chain, f"original{i}") for i in range(chain.ntensors)]
        for share in _chain(module, tensor)[:count]:
            values = [share(*values)]
        (value,) = values
    assert isinstance(value, Tensor)
    return value


def _precision(tensor: Tensor) -> torch.dtype:
    # Without gradients the result is kept (a fold), so it is worth a single rounding. In training,
    # float64 copies of every weight would cost the memory that tune mode is for.
    return (
        torch.promote_types(tensor.dtype, torch.float32)
        if torch.is_grad_enabled()
        else torch.float64
    )
