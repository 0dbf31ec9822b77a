"""Edits that let the first layers of a model take raw pixels."""

from functools import wraps
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normswap.passes.edits.base import BaseEdit, NewName
from normswap.passes.edits.forward import below_parametrizations


class RawInput:
    """Mixed into the class of a layer: it takes raw pixels, integers too.

    The layer stays what it was, with its class among the bases and its parameters, state-dict keys
    and hooks. Integers are cast to the dtype of its weight.

    Attributes:
        plain: the class without this mixin.
        raw_offset: subtracted from its input, (C, 1, ...); None where its bias does that. It
            follows from the recipe of the model and is not in its state dict.
    """

    plain: type[nn.Module]
    raw_offset: Tensor | None

    def from_raw(self, x: Tensor) -> Tensor:
        """What the layer itself takes."""
        if not x.is_floating_point():
            assert isinstance(self, nn.Module)
            x = x.to(_weight_of(self).dtype)
        return x if self.raw_offset is None else x - self.raw_offset.to(x.dtype)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so pickle and deepcopy are told how to make it again.
        state = super().__reduce_ex__(protocol)[2:]
        return _raw_instance, (self.plain,), *state


def _weight_of(layer: nn.Module) -> Tensor:
    """A tensor of the dtype and device of its weight, which may be a buffer where it is fixed."""
    tensors = (*layer.parameters(), *layer.buffers())
    return next(each for each in tensors if each.is_floating_point())


_raw_classes: dict[type[nn.Module], type[nn.Module]] = {}


def raw_class(cls: type[nn.Module]) -> type[nn.Module]:
    """`cls`, whose forward takes one value, with `RawInput` mixed in; one class per `cls`."""
    if cls not in _raw_classes:

        @wraps(cls.forward)  # an exporter names the inputs as its signature does
        def forward(self: Any, *args: Tensor, **kwargs: Tensor) -> Any:
            (x,) = (*args, *kwargs.values())
            return cls.forward(self, self.from_raw(x))

        body = {
            "forward": forward,
            "plain": cls,
            "__module__": cls.__module__,
            "__doc__": RawInput.__doc__,
        }
        made = type(f"Raw{cls.__name__}", (RawInput, cls), body)
        _raw_classes.setdefault(cls, made)  # another thread may have been first
    return _raw_classes[cls]


def _raw_instance(cls: type[nn.Module]) -> nn.Module:
    return object.__new__(raw_class(cls))


class InputAffine(nn.Module):
    """The normalization of an input, y = scale * x + shift per channel, while it moves."""

    def __init__(
        self, scale: tuple[float, ...], shift: tuple[float, ...], device: torch.device
    ) -> None:
        super().__init__()
        self.scale, self.shift, self.device = scale, shift, device

    def eval_affine(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scale and shift, (C,)."""
        scale, shift = (
            torch.tensor(numbers, dtype=dtype, device=self.device)
            for numbers in (self.scale, self.shift)
        )
        return scale, shift


class OfferInputAffine(BaseEdit):
    """Let weights fold in the normalization of the input; `DropInputAffine` ends it."""

    edit: Literal["offer_input_affine"] = "offer_input_affine"
    path: NewName
    scale: tuple[float, ...]
    shift: tuple[float, ...]

    def apply(self, model: nn.Module) -> None:
        self.require(not hasattr(model, self.path))
        device = next(iter([*model.parameters(), *model.buffers()])).device
        model.add_module(self.path, InputAffine(self.scale, self.shift, device))

    def raw(self, call: Any) -> Any:
        """The arguments of a call, with raw pixels in the place of its first tensor of numbers."""
        leaves, spec = pytree.tree_flatten(call)
        first = next(i for i, each in enumerate(leaves) if _is_floating_point(each))
        value = leaves[first]
        shape = (-1, *[1] * (value.dim() - 2))
        scale, shift = (
            torch.tensor(each, dtype=torch.float64) for each in (self.scale, self.shift)
        )
        raw = (value.detach().cpu().double() - shift.view(shape)) / scale.view(shape)
        leaves[first] = raw.to(value.device, value.dtype)
        return pytree.tree_unflatten(leaves, spec)

    def __str__(self) -> str:
        return "move the normalization of the input"


def _is_floating_point(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


class DropInputAffine(BaseEdit):
    """What has moved the normalization of the input goes."""

    edit: Literal["drop_input_affine"] = "drop_input_affine"
    is_step: ClassVar[bool] = True

    def apply(self, model: nn.Module) -> None:
        self.require(isinstance(self.module(model), InputAffine))
        delattr(model, self.path)

    def __str__(self) -> str:
        return "done"


class TakeRawInput(BaseEdit):
    """Let a layer take raw pixels, and subtract `offset`, (C, 1, ...), from them, if there is one.

    Attributes:
        offset: one number for each channel.
        spatial: how many axes come after the channels.
    """

    edit: Literal["take_raw_input"] = "take_raw_input"
    is_step: ClassVar[bool] = True
    offset: tuple[float, ...] | None = None
    spatial: Annotated[int, Field(ge=0, le=3)] = 0

    def apply(self, model: nn.Module) -> None:
        layer = self.module(model)
        self.require(not isinstance(layer, RawInput))
        like = _weight_of(layer)
        offset = None
        if self.offset is not None:
            offset = torch.tensor(self.offset, dtype=torch.float64).to(like.device, like.dtype)
            offset = offset.view(-1, *[1] * self.spatial)
        layer.register_buffer("raw_offset", offset, persistent=False)
        with below_parametrizations(layer):
            layer.__class__ = raw_class(type(layer))

    def __str__(self) -> str:
        return f"{self.path} takes raw pixels"
