"""Spectral normalization: a weight divided by its largest singular value, sigma.

Miyato et al. 2018 (arXiv 1802.05957), algorithm 1: sigma = u^T W v with u and v from power
iterations, one per training step, which the gradient takes as constants. With a gain g, W' = g W /
sigma: g starts at sigma, so that a trained weight is kept, and is learned. Without one it is the
paper's W / sigma, and torch's own (`torch.nn.utils.parametrizations.spectral_norm`).

For a convolution W is either the weight reshaped to the matrix (output units, the rest), as in the
paper, or the convolution itself as a linear map of inputs of one size, with its stride, padding,
dilation and groups: the iterations then apply it and its transpose (Ryu et al. 2019, arXiv
1905.05957; the map whose singular values are those of Sedghi et al. 2019, arXiv 1805.10408).
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.core.compat import AnyConv, AnyConvTranspose
from normswap.core.errors import NormswapError, first_line
from normswap.norms.kernels import statistics_dtype, without_autocast
from normswap.norms.registry import register
from normswap.norms.weight.units import Units, units_of

START = 100  # iterations at registration; they leave an error of sigma below 1 %, in the gain


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


class SpectralNorm(nn.Module):
    """W' = g W / sigma(W), or W / sigma(W).

    Args:
        weight: of the shape, dtype and device of those to come.
        linear: what it is as a linear map.
        n_power_iterations: in each forward in training mode; 0 for the singular value itself, by
            SVD, of a matrix.
        eps: a sigma is at least this, and what the iterations divide by.
        gain: whether there is a gain; the originals are then g, a scalar, and W.
    """

    _u: Tensor
    _v: Tensor

    def __init__(
        self,
        weight: Tensor,
        linear: LinearMap,
        n_power_iterations: int = 1,
        eps: float = 1e-12,
        *,
        gain: bool = True,
    ) -> None:
        super().__init__()
        self.linear, self.n_power_iterations = linear, n_power_iterations
        self.eps, self.gain = eps, gain
        if n_power_iterations:
            generator = torch.Generator().manual_seed(0)  # a plan gives the same model every time
            for name, shape in zip(("_u", "_v"), linear.shapes(weight), strict=True):
                start = torch.randn(shape, generator=generator, dtype=torch.float64)
                self.register_buffer(name, self._unit(start).to(weight))

    def forward(self, *originals: Tensor) -> Tensor:
        weight = originals[-1]
        if self.training:
            self._iterate(weight, self.n_power_iterations)
        sigma = self._sigma(weight)
        scale = originals[0] / sigma if self.gain else sigma.reciprocal()
        return (weight * scale).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        self._iterate(weight, START if self.n_power_iterations else 0)
        return (self._sigma(weight).to(weight.dtype), weight) if self.gain else weight

    def _sigma(self, weight: Tensor) -> Tensor:
        wide = weight.to(statistics_dtype(weight))
        # In half precision the products would be off by a percent, and u and v never settle.
        with without_autocast(weight.device.type):
            if self.n_power_iterations:
                # Copies, because the next iteration changes u and v where a backward may need them.
                u, v = self._u.to(wide, copy=True), self._v.to(wide, copy=True)
                sigma = (u * self.linear.map(wide, v)).sum()
            else:
                assert isinstance(self.linear, AsMatrix)
                sigma = torch.linalg.svdvals(self.linear.matrix(wide))[0]
            return sigma.clamp(min=self.eps)

    @torch.no_grad()
    def _iterate(self, weight: Tensor, times: int) -> None:
        weight = weight.detach().to(statistics_dtype(weight))
        with without_autocast(weight.device.type):
            for _ in range(times):
                u = self._unit(self.linear.map(weight, self._v.to(weight)))
                self._u.copy_(u)
                self._v.copy_(self._unit(self.linear.map_back(weight, u)))

    def _unit(self, vector: Tensor) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(vector)
        return vector / length.clamp(min=self.eps)


def _build(
    module: nn.Module,
    name: str,
    *,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    solver: Literal["power", "svd"] = "power",
    gain: bool = True,
    conv: Literal["matrix", "operator"] = "matrix",
    input_size: int | Sequence[int] | None = None,
) -> nn.Module:
    """
    Args:
        solver: of sigma.
        conv: what W is, for a convolution: the weight as a matrix, or the map it computes.
        input_size: of the inputs of that map, without channels; one number where all are the same.
    """
    if solver not in ("power", "svd") or conv not in ("matrix", "operator"):
        raise NormswapError("solver is 'power' or 'svd', and conv is 'matrix' or 'operator'")
    if n_power_iterations < 1:
        raise NormswapError(f"n_power_iterations must be at least 1, not {n_power_iterations}")
    weight: Tensor = getattr(module, name)
    iterations = n_power_iterations if solver == "power" else 0
    if conv == "matrix" or not isinstance(module, AnyConv):
        return SpectralNorm(weight, AsMatrix(units_of(module, name)), iterations, eps, gain=gain)
    if solver == "svd":
        raise NormswapError("the operator of a convolution has no svd here; use solver='power'")
    try:
        return SpectralNorm(weight, AsConvolution(module, input_size), iterations, eps, gain=gain)
    except RuntimeError as error:
        raise NormswapError(
            f"this {type(module).__name__} takes no input of size {input_size}: {first_line(error)}"
        ) from error


register(
    "spectral_norm",
    _build,
    kind="weight",
    keeps="exact",
    summary="the weight divided by its largest singular value, times a gain",
    source="Miyato et al. 2018, arXiv 1802.05957",
    formula="gain W / sigma(W), sigma by power iterations",
    statistics="weight",
    cost="4 passes over the weight",
)
