"""The edits that multiply values by powers of two: those of a group, or the channels of some."""

from math import ldexp, prod
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from normswap.core.errors import NormswapError
from normswap.graph.index import join
from normswap.graph.norm_modules import formula
from normswap.graph.operators.rule import ChannelIndex
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
    overwrites: ClassVar[bool] = True
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


class RescaledChannels(BaseModel):
    """A weight or a bias that takes in the numbers of channels.

    Attributes:
        path, tensor: the module and the name.
        channel_index: where the channels lie in it.
        inverse: it is divided by them, as what takes the values is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    tensor: str
    channel_index: ChannelIndex
    inverse: bool = False

    def factors(self, exponents: Tensor) -> Tensor:
        """What the tensor, or its view, is multiplied by, given the exponent of each channel."""
        channels = self.channel_index.channels
        padded = torch.cat([exponents, exponents.new_zeros(1)])  # the last is of no channel
        own = exponents if channels is None else padded[torch.tensor(channels)]
        own = own[: prod(self.channel_index.shape)]
        return torch.pow(2.0, -own if self.inverse else own).view(self.channel_index.shape)


class RescaleChannels(BaseEdit):
    """Multiply each channel of some values by 2^exponent, by what computes and what takes them.

    Attributes:
        exponents: of each channel.
    """

    edit: Literal["rescale_channels"] = "rescale_channels"
    overwrites: ClassVar[bool] = True
    exponents: tuple[Annotated[int, Field(ge=-_MOST, le=_MOST)], ...]
    tensors: tuple[RescaledChannels, ...]

    def apply(self, model: nn.Module) -> None:
        exponents = torch.tensor(self.exponents, dtype=torch.float64)
        for each in self.tensors:
            module, index = self.module(model, each.path), each.channel_index
            self.require(each.tensor not in parametrized_tensors(module))
            tensor = getattr(module, each.tensor, None)
            self.require(isinstance(tensor, Tensor) and index.fit(tensor))
            assert isinstance(tensor, Tensor)
            self.require(max(index.channels or (0,)) < len(exponents))
            with rewritten(model, module, each.tensor) as scaled:
                wide = torch.promote_types(scaled.dtype, torch.float32)
                factors = each.factors(exponents).to(scaled.device, wide)
                scaled.view(index.view or scaled.shape).mul_(factors)
            _check_range(getattr(module, each.tensor), join(each.path, each.tensor))

    def __str__(self) -> str:
        return f"scale its channels by 2^{min(self.exponents)} to 2^{max(self.exponents)}"


def _check_range(tensor: Tensor, name: str) -> None:
    if not tensor.is_meta and not bool(tensor.isfinite().all()):
        raise NormswapError(f"{name} would leave the range of {tensor.dtype}; plan it anew")
