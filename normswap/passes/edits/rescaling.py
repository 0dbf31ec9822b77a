"""The edit that multiplies the values of a group by a power of two."""

from math import ldexp
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from normswap.core.errors import NormswapError
from normswap.graph.index import join
from normswap.graph.norm_modules import formula
from normswap.graph.parametrized import parametrized_tensors
from normswap.passes.edits.base import BaseEdit, rewritten

_MOST = 32  # doublings: far more than the range of any type needs


class RescaledTensor(BaseModel):
    """A weight, a bias or a statistic that takes the number in.

    Attributes:
        path, tensor: the module and the name.
        times: how often: 1 on the output side of a weight, -1 on its input side, 2 of a variance.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    tensor: str
    times: Annotated[int, Field(ge=-8, le=8)]


class RescaledEps(BaseModel):
    """The eps of a normalization, an attribute of its module, which takes in the square."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    attribute: str


class RescaleGroup(BaseEdit):
    """Multiply all values of a group by 2^exponent, by what computes and what takes them."""

    edit: Literal["rescale"] = "rescale"
    exponent: Annotated[int, Field(ge=-_MOST, le=_MOST)]
    tensors: tuple[RescaledTensor, ...]
    eps: tuple[RescaledEps, ...] = ()

    def apply(self, model: nn.Module) -> None:
        for each in self.tensors:
            module = self.module(model, each.path)
            self.require(each.tensor not in parametrized_tensors(module))
            tensor = getattr(module, each.tensor, None)
            self.require(isinstance(tensor, Tensor) and tensor.is_floating_point())
            assert isinstance(tensor, Tensor)
            reach = (
                0.0 if tensor.is_meta or not tensor.numel() else float(tensor.detach().abs().max())
            )
            factor = 2.0 ** (self.exponent * each.times)
            if reach < float("inf") and reach * factor > torch.finfo(tensor.dtype).max:
                raise NormswapError(
                    f"{join(each.path, each.tensor)} would leave the range of {tensor.dtype}; "
                    "plan it anew"
                )
            with rewritten(model, module, each.tensor) as scaled:
                scaled.mul_(factor)
        for norm in self.eps:
            module = self.module(model, norm.path)
            found = formula(module)
            self.require(found is not None and hasattr(module, norm.attribute))
            assert found is not None
            eps = found.eps
            if getattr(module, norm.attribute) is None:  # the machine epsilon, by nn.RMSNorm
                like = (*module.parameters(recurse=False), *model.parameters())
                eps = torch.finfo(like[0].dtype).eps
            setattr(module, norm.attribute, ldexp(eps, 2 * self.exponent))

    def __str__(self) -> str:
        return f"scale by 2^{self.exponent}"
