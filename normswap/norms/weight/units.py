"""The output units of a weight: the parts that a method of normalizing weights treats one by one.

A unit is what one output feature is computed with: a row of a Linear's weight (out, in), a filter
of a convolution's (C_out, C_in / groups, ...). In that of a transposed convolution, (C_in, C_out /
groups, ...), the units lie along axis 1, in each of the groups that axis 0 consists of.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from normswap.core.compat import AnyConvTranspose
from normswap.core.errors import NormswapError


@dataclass(frozen=True)
class Units:
    """Where the units of a weight lie.

    Attributes:
        axis: their axis; None where the whole tensor is one.
        groups: more than 1 in a grouped transposed convolution: how many parts axis 0 has, each
            with units of its own along axis 1.
    """

    axis: int | None = 0
    groups: int = 1

    def split(self, weight: Tensor) -> Tensor:
        """The weight as (groups, units, ...), a view."""
        if self.axis is None:
            return weight[None, None]
        if self.groups == 1:
            return weight.movedim(self.axis, 0).unsqueeze(0)
        return weight.view(self.groups, -1, *weight.shape[1:]).transpose(1, 2)

    def join(self, split: Tensor) -> Tensor:
        """The inverse of `split`, for tensors (groups, units, 1, ...) as well."""
        if self.axis is None:
            return split[0, 0]
        if self.groups == 1:
            return split.squeeze(0).movedim(0, self.axis)
        return split.transpose(1, 2).flatten(0, 1)


def units_of(module: nn.Module, name: str) -> Units:
    """The units of the weight `name` of a Linear or a convolution, transposed or not.

    Raises:
        NormswapError: the tensor has no units of several values, as a bias.
    """
    rank = getattr(module, name).dim()
    if rank < 2:
        raise NormswapError(f"{name} is of rank {rank}; only weights of rank 2 or more have units")
    if isinstance(module, AnyConvTranspose):
        return Units(1, module.groups)
    return Units()
