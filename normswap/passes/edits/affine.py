"""Edits that take the gain and bias off a normalization, once weights compute them."""

from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from normswap.core.errors import Unsupported
from normswap.graph.norm_modules import anatomy, formula, norm_kind
from normswap.graph.propagation.scale_shift import Conditions, ScaleShift
from normswap.passes.edits.base import BaseEdit, gain_and_bias_of
from normswap.passes.edits.statistics import check_conditions

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


class OfferGain(BaseEdit):
    """Let weights fold in the gain and bias of a normalization; `DropGain` ends it."""

    edit: Literal["offer_gain"] = "offer_gain"
    conditions: Conditions = Conditions()

    def check_numbers(self, model: nn.Module) -> None:
        with torch.no_grad():
            gain, bias = gain_and_bias(self.module(model), torch.float64)
        check_conditions(
            model, self.site, self.conditions, ScaleShift(gain, bias, invertible=False)
        )

    def apply(self, model: nn.Module) -> None:
        norm = self.module(model)
        self.require(bool(gain_and_bias_of(norm)))
        norm.eval_affine = partial(gain_and_bias, norm)  # type: ignore[assignment]

    def __str__(self) -> str:
        return "move its gain and bias"


class DropGain(BaseEdit):
    """Leave a normalization its statistics alone."""

    edit: Literal["drop_gain"] = "drop_gain"
    is_step: ClassVar[bool] = True

    def apply(self, model: nn.Module) -> None:
        norm = self.module(model)
        self.require("eval_affine" in vars(norm))
        del norm.eval_affine
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
