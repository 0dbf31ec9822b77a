"""The edit that rotates a stream: an orthogonal matrix goes into all that writes and reads it."""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from normswap.core.errors import NormswapError
from normswap.graph.norm_modules import formula
from normswap.graph.parametrized import parametrized_tensors
from normswap.passes.edits.affine import gain_and_bias
from normswap.passes.edits.base import BaseEdit, Count, gain_and_bias_of, rewritten
from normswap.passes.orthogonal import Orthogonal

Starts = Annotated[tuple[Count, ...], Field(min_length=1)]
_TILE = 2**20  # numbers that are computed in float64 at a time


class RotatedTensor(BaseModel):
    """A weight, a bias or a constant that the matrix is applied to along one axis.

    Along the axis of the outputs that is W' = Q W and b' = Q b, along that of the inputs
    W' = W Q^T. A tensor that several modules own stays one.

    Attributes:
        path, tensor: the module and the name.
        axis: that of the channels.
        starts: where each block of channels begins along it.
        gain: the module and name of a gain per channel that it is multiplied by first, and that is
            1 afterwards.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    tensor: str
    axis: Count = 0
    starts: Starts = (0,)
    gain: tuple[str, str] | None = None


class RotatedNorm(BaseModel):
    """A normalization on the stream: its gain has to be 1, and its bias is rotated.

    Attributes:
        path: of the module.
        starts: where each block of channels begins among those that it normalizes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    starts: Starts = (0,)


class RotateStream(BaseEdit):
    """Rotate all values of a stream by one orthogonal matrix, by what writes and reads them."""

    edit: Literal["rotate"] = "rotate"
    overwrites: ClassVar[bool] = True
    matrix: Orthogonal
    tensors: Annotated[tuple[RotatedTensor, ...], Field(min_length=1)]
    norms: tuple[RotatedNorm, ...] = ()

    def check_numbers(self, model: nn.Module) -> None:
        for each in self.norms:
            norm = self.module(model, each.path)
            if not gain_and_bias_of(norm):
                continue
            gain, _ = gain_and_bias(norm, torch.float64)
            if not gain.is_meta and not bool((gain == 1).all()):
                raise NormswapError(
                    f"the gain of {each.path} is not 1, so that it does not commute with a "
                    "rotation; plan it anew"
                )

    def apply(self, model: nn.Module) -> None:
        matrix = self.matrix.matrix()
        for each in self.tensors:
            self._rotate(model, each.path, each.tensor, each.axis, each.starts, each.gain, matrix)
        for path, name in dict.fromkeys(each.gain for each in self.tensors if each.gain):
            with rewritten(model, self.module(model, path), name) as ones:
                ones.fill_(1)
        for norm in self.norms:
            found = formula(self.module(model, norm.path))
            self.require(found is not None)
            if found is not None and found.bias is not None:
                self._rotate(model, norm.path, found.bias, None, norm.starts, None, matrix)

    def _rotate(
        self,
        model: nn.Module,
        path: str,
        name: str,
        axis: int | None,
        starts: tuple[int, ...],
        gain: tuple[str, str] | None,
        matrix: Tensor,
    ) -> None:
        """Rotate one tensor, all axes of which are those of the channels where `axis` is None."""
        module = self.module(model, path)
        self.require(name not in parametrized_tensors(module))
        tensor = getattr(module, name, None)
        self.require(isinstance(tensor, Tensor) and tensor.dim() > (axis or 0))
        assert isinstance(tensor, Tensor)
        channels = tensor.numel() if axis is None else tensor.shape[axis]
        self.require(max(starts) + len(matrix) <= channels)
        scale = None
        if gain is not None:
            scale = getattr(self.module(model, gain[0]), gain[1], None)
            self.require(isinstance(scale, Tensor) and scale.numel() == channels)
        with rewritten(model, module, name) as result:
            rows = result.view(-1) if axis is None else result.movedim(axis, -1)
            _rotate_rows(rows, matrix.to(tensor.device), starts, scale)

    def __str__(self) -> str:
        kind = {"hadamard": "a Hadamard", "random": "a random", "given": "the given"}
        count = f"{len(self.tensors)} tensor{'s' * (len(self.tensors) > 1)}"
        return f"rotate {count} by {kind[self.matrix.kind]} matrix"


def _rotate_rows(
    rows: Tensor, matrix: Tensor, starts: tuple[int, ...], gain: Tensor | None
) -> None:
    """Apply the matrix to each row, in place, computed in float64, a tile at a time.

    Args:
        rows: (..., C).
        gain: (C,), that each row is multiplied by first.
    """
    rows = rows.unsqueeze(0) if rows.dim() == 1 else rows
    scale = None if gain is None else gain.detach().double().flatten()
    step = max(1, _TILE // max(1, rows[0].numel()))
    for first in range(0, len(rows), step):
        tile = rows[first : first + step]
        wide = tile.double() if scale is None else tile.double() * scale
        for start in starts:
            block = wide.narrow(-1, start, len(matrix))
            block.copy_(block @ matrix.T)
        tile.copy_(wide)
