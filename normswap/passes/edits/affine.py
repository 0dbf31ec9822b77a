"""Edits that take an affine off, once weights compute it: the gain and bias of a normalization, or
the normalization of a model's input, so that its first layers take raw pixels.
"""

from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from normswap.core.compat import pytree
from normswap.core.errors import Unsupported
from normswap.graph.norm_modules import anatomy, formula, norm_kind
from normswap.passes.edits.base import BaseEdit, gain_and_bias_of
from normswap.passes.edits.traced_forward import below_parametrizations

# How torch's classes say that they have a gain.
_FLAGS = ("elementwise_affine", "affine")


def gain_and_bias(norm: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The affine y = gain * n + bias after the statistics of a normalization, each (C,)."""
    held = gain_and_bias_of(norm)
    gain, bias = held.get("weight"), held.get("bias")
    if gain is not None:
        gain = gain.to(dtype)
        return gain, torch.zeros_like(gain) if bias is None else bias.to(dtype)
    assert bias is not None
    return torch.ones_like(bias, dtype=dtype), bias.to(dtype)


@dataclass(frozen=True)
class GainAndBias:
    """The affine of a normalization after its statistics, as `scale_and_shift` asks for it."""

    norm: nn.Module

    def eval_affine(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Gain and bias, (C,)."""
        return gain_and_bias(self.norm, dtype)


class DropGain(BaseEdit):
    """Leave a normalization its statistics alone; weights have its gain and bias."""

    edit: Literal["drop_gain"] = "drop_gain"

    def apply(self, model: nn.Module) -> None:
        norm = self.module(model)
        self.require(bool(gain_and_bias_of(norm)))
        found, before = formula(norm), (dict(norm._parameters), dict(norm._buffers))
        assert found is not None
        for held in (norm._parameters, norm._buffers):
            for name in {found.gain, found.bias} & held.keys():
                held[name] = None  # type: ignore[index]
        for flag in _FLAGS:
            if hasattr(norm, flag):
                setattr(norm, flag, False)
        if norm_kind(norm) is None or not self._runs(norm):
            norm._parameters.update(before[0])
            norm._buffers.update(before[1])
            self._set(norm, found.gain, 1.0 - found.gain_offset)
            self._set(norm, found.bias, 0.0)

    def _runs(self, norm: nn.Module) -> bool:
        """Whether its forward does without the tensors."""
        try:
            anatomy(norm)
        except Unsupported:
            return False
        return True

    def _set(self, norm: nn.Module, name: str | None, value: float) -> None:
        """The forward of an unknown class may need its tensor: then one that changes nothing."""
        old = None if name is None else getattr(norm, name)
        if name is None or old is None:
            return
        new = torch.full_like(old, value)
        if name in norm._parameters:
            norm._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)
        else:
            norm._buffers[name] = new

    def __str__(self) -> str:
        return "its statistics alone"


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


@dataclass(frozen=True)
class InputAffine:
    """The affine of an input, as `scale_and_shift` asks for it."""

    given: "GivenAffine"
    device: torch.device

    def eval_affine(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scale and shift, (C,)."""
        return self.given.tensors(dtype, self.device)


class GivenAffine(BaseModel):
    """An affine that the plan itself has the numbers of: the normalization of an input.

    Attributes:
        scale, shift: of each channel.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    scale: tuple[float, ...]
    shift: tuple[float, ...]

    def tensors(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """Scale and shift, (C,)."""
        scale = torch.tensor(self.scale, dtype=dtype, device=device)
        return scale, torch.tensor(self.shift, dtype=dtype, device=device)

    def raw(self, call: Any) -> Any:
        """The arguments of a call, with raw pixels in the place of its first tensor of numbers."""
        leaves, spec = pytree.tree_flatten(call)
        first = next(i for i, each in enumerate(leaves) if _is_floating_point(each))
        value = leaves[first]
        shape = (-1, *[1] * (value.dim() - 2))
        cpu = torch.device("cpu")
        scale, shift = (each.view(shape) for each in self.tensors(torch.float64, cpu))
        raw = (value.detach().cpu().double() - shift) / scale
        leaves[first] = raw.to(value.device, value.dtype)
        return pytree.tree_unflatten(leaves, spec)


def _is_floating_point(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


class TakeRawInput(BaseEdit):
    """Let a layer take raw pixels, and subtract `offset`, (C, 1, ...), from them, if there is one.

    Attributes:
        offset: one number for each channel.
        spatial: how many axes come after the channels.
    """

    edit: Literal["take_raw_input"] = "take_raw_input"
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
