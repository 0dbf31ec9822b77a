"""A weight as a linear map, whose largest singular value spectral normalization divides by."""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.core.compat import AnyConv, AnyConvTranspose
from normswap.core.errors import NormswapError
from normswap.norms.weight.units import Units


class LinearMap(Protocol):
    """What a weight is as a linear map, from v to u."""

    def map(self, weight: Tensor, v: Tensor) -> Tensor:
        """W v."""
        ...

    def map_back(self, weight: Tensor, u: Tensor) -> Tensor:
        """W^T u."""
        ...

    def shapes(self, weight: Tensor) -> tuple[torch.Size, torch.Size]:
        """Those of u and v."""
        ...


class AsMatrix:
    """The weight as the matrix (output units, the rest)."""

    def __init__(self, units: Units) -> None:
        self.units = units

    def matrix(self, weight: Tensor) -> Tensor:
        return self.units.split(weight).flatten(0, 1).flatten(1)

    def map(self, weight: Tensor, v: Tensor) -> Tensor:
        return self.matrix(weight) @ v

    def map_back(self, weight: Tensor, u: Tensor) -> Tensor:
        return self.matrix(weight).mT @ u

    def shapes(self, weight: Tensor) -> tuple[torch.Size, torch.Size]:
        rows, columns = self.matrix(weight).shape
        return torch.Size([rows]), torch.Size([columns])


class AsConvolution(nn.Module):
    """The weight as what `convolution` computes with it, without the bias, of inputs of one size.

    A convolution's transpose is the transposed convolution of the same numbers, and the other way
    round. A padding that is not a number of zeros on either side (a mode, "same") is done before:
    `source` has for every position of the padded input the one whose value it has, one past the
    last for a zero.

    Args:
        convolution: with any stride, padding, dilation and groups.
        input_size: without channels; one number stands for all axes.

    Raises:
        NormswapError: the size is missing, or not one of its inputs.
    """

    source: Tensor | None

    def __init__(self, convolution: AnyConv, input_size: int | Sequence[int] | None) -> None:
        super().__init__()
        rank = len(convolution.kernel_size)
        if input_size is None:
            raise NormswapError("conv='operator' needs input_size, or example inputs that show it")
        size = [input_size] * rank if isinstance(input_size, int) else list(input_size)
        if len(size) != rank:
            raise NormswapError(
                f"input_size {size} should be {rank} numbers for a {type(convolution).__name__}"
            )
        self.input_shape = torch.Size([convolution.in_channels, *size])
        self.transposed = isinstance(convolution, AnyConvTranspose)
        self.stride, self.dilation = convolution.stride, convolution.dilation
        self.groups, self.output_padding = convolution.groups, convolution.output_padding
        self.padding, source = (0,) * rank, None
        if convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str):
            self.padding = convolution.padding
        else:
            source = _padded_positions(size, convolution)
        self.register_buffer("source", source, persistent=False)

    def map(self, weight: Tensor, v: Tensor) -> Tensor:
        if self.transposed:
            return self._convolve(weight, v, transposed=True, output_padding=self.output_padding)
        if self.source is not None:
            v = F.pad(v.flatten(1), (0, 1))[:, self.source]
        return self._convolve(weight, v)

    def map_back(self, weight: Tensor, u: Tensor) -> Tensor:
        if self.transposed:
            return self._convolve(weight, u)
        channels, *size = self.input_shape
        padded_size = size if self.source is None else self.source.shape
        left_over = self._left_over(weight, u, padded_size)
        v = self._convolve(weight, u, transposed=True, output_padding=left_over)
        if self.source is None:
            return v
        positions = v.new_zeros(channels, torch.Size(size).numel() + 1)
        positions = positions.index_add(1, self.source.flatten(), v.flatten(1))
        return positions[:, :-1].reshape(self.input_shape)

    def shapes(self, weight: Tensor) -> tuple[torch.Size, torch.Size]:
        v = torch.zeros(self.input_shape, dtype=torch.float32, device=weight.device)
        return self.map(weight.detach().float(), v).shape, self.input_shape

    def _convolve(
        self,
        weight: Tensor,
        x: Tensor,
        *,
        transposed: bool = False,
        output_padding: Sequence[int] = (0,),
    ) -> Tensor:
        return torch.convolution(
            x[None],
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            transposed,
            output_padding,
            self.groups,
        )[0]

    def _left_over(self, weight: Tensor, u: Tensor, size: Sequence[int]) -> list[int]:
        """How much longer inputs of `size` are than the shortest with outputs like u."""
        axes = zip(
            size,
            u.shape[1:],
            weight.shape[2:],
            self.stride,
            self.padding,
            self.dilation,
            strict=True,
        )
        return [
            inputs - ((outputs - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1)
            for inputs, outputs, kernel, stride, padding, dilation in axes
        ]


def _padded_positions(size: Sequence[int], convolution: AnyConv) -> Tensor:
    count = torch.Size(size).numel()
    positions = torch.arange(count, dtype=torch.float64).view(1, 1, *size)
    around = convolution._reversed_padding_repeated_twice
    if convolution.padding_mode == "zeros":
        padded = F.pad(positions, around, value=float(count))
    else:
        padded = F.pad(positions, around, convolution.padding_mode)
    return padded[0, 0].long()
