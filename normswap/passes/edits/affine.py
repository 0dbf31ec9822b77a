"""Edits that take an affine off, once weights compute it: the gain and bias of a normalization, or
the normalization of a model's input, so that its first layers take raw pixels.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from normswap.core.compat import pytree
from normswap.core.mixins import Mixin, mixed
from normswap.graph.norm_modules import formula
from normswap.passes.edits.base import BaseEdit, computing, gain_and_bias_of, set_tensor
from normswap.passes.edits.traced_forward import below_parametrizations


def gain_and_bias(norm: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The affine y = gain * n + bias after the statistics of a normalization, each (C,)."""
    held = gain_and_bias_of(norm)
    gain, bias = held.get("weight"), held.get("bias")
    if gain is not None:
        gain = gain.to(dtype)
        return gain, torch.zeros_like(gain) if bias is None else bias.to(dtype)
    assert bias is not None
    return torch.ones_like(bias, dtype=dtype), bias.to(dtype)


def is_bare(norm: nn.Module) -> bool:
    """Whether the gain of a normalization is 1, and its bias 0, or it has none."""
    found, held = formula(norm), gain_and_bias_of(norm)
    if found is None or found.why_not is not None or any(t.is_meta for t in held.values()):
        return False
    return all(bool((each == (role == "weight")).all()) for role, each in held.items())


@dataclass(frozen=True)
class GainAndBias:
    """The affine of a normalization after its statistics, as `scale_and_shift` asks for it."""

    norm: nn.Module

    def eval_affine(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Gain and bias, (C,)."""
        return gain_and_bias(self.norm, dtype)


class ResetGain(BaseEdit):
    """Let the gain of a normalization be 1 and its bias 0, once weights have them.

    The parameters stay, so that a checkpoint has the keys that the class of the model expects. Of a
    gain that is stored as how far it is from 1 the parameter is 0.

    Attributes:
        keeps_bias: weights have the gain alone, y = gain (n + bias / gain): the bias is divided.
    """

    edit: Literal["reset_gain"] = "reset_gain"
    overwrites: ClassVar[bool] = True
    keeps_bias: bool = False

    def check_numbers(self, model: nn.Module) -> None:
        if self.keeps_bias:
            self.require(len(gain_and_bias_of(self.module(model))) > 1)
            self.require_none(divided_bias_why_not(self.module(model)))

    def apply(self, model: nn.Module) -> None:
        norm = self.module(model)
        self.require(bool(gain_and_bias_of(norm)))
        found = formula(norm)
        assert found is not None
        if self.keeps_bias:
            self.require(found.bias is not None)
            gain, bias = gain_and_bias(norm, torch.float64)
            assert found.bias is not None
            held = getattr(norm, found.bias)
            set_tensor(norm, found.bias, (bias / gain).to(held.dtype).view(held.shape))
        for name, value in ((found.gain, 1.0 - found.gain_offset), (found.bias, 0.0)):
            if name is not None and not (self.keeps_bias and name == found.bias):
                set_tensor(norm, name, torch.full_like(getattr(norm, name), value))

    def __str__(self) -> str:
        return "its statistics and a bias" if self.keeps_bias else "its statistics alone"


# How many times as large as the normalized values the bias may be that is added to them: so many
# times as large are the rounding errors then.
_LARGEST_BIAS = 8.0


def divided_bias_why_not(norm: nn.Module) -> str | None:
    """Why bias / gain cannot take the place of the bias of `norm`; None where it can."""
    gain, bias = gain_and_bias(norm, torch.float64)
    if gain.is_meta or bool((bias.abs() <= _LARGEST_BIAS * gain.abs()).all() and (gain != 0).all()):
        return None
    return "its gain is too small beside its bias to be divided out of it"


class RawInput(Mixin):
    """Mixed into the class of a layer: it takes raw pixels, integers too.

    The layer stays what it was, with its class among the bases and its parameters, state-dict keys
    and hooks. Integers are cast to the dtype of its weight.

    Attributes:
        raw_offset: subtracted from its input, (C, 1, ...); None where its bias does that. It
            follows from the recipe of the model and is not in its state dict.
    """

    _prefix = "Raw"
    raw_offset: Tensor | None

    def _around(self, forward: Any, *args: Tensor, **kwargs: Tensor) -> Any:
        (x,) = (*args, *kwargs.values())
        if not x.is_floating_point():
            assert isinstance(self, nn.Module)
            x = x.to(computing(self).dtype)
        return forward(self, x if self.raw_offset is None else x - self.raw_offset.to(x.dtype))


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
        first = next(i for i, each in enumerate(leaves) if is_floating_point(each))
        value = leaves[first]
        shape = (-1, *[1] * (value.dim() - 2))
        cpu = torch.device("cpu")
        scale, shift = (each.view(shape) for each in self.tensors(torch.float64, cpu))
        raw = (value.detach().cpu().double() - shift) / scale
        leaves[first] = raw.to(value.device, value.dtype)
        return pytree.tree_unflatten(leaves, spec)


def is_floating_point(value: Any) -> bool:
    """Whether it is a tensor of floating-point numbers."""
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
        like = computing(layer)
        offset = None
        if self.offset is not None:
            offset = torch.tensor(self.offset, dtype=torch.float64).to(like.device, like.dtype)
            offset = offset.view(-1, *[1] * self.spatial)
        layer.register_buffer("raw_offset", offset, persistent=False)
        with below_parametrizations(layer):
            layer.__class__ = mixed(RawInput, type(layer))

    def __str__(self) -> str:
        return f"{self.path} takes raw pixels"
