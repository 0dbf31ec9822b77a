"""Edits that take the gain and bias off a normalization, once weights compute them."""

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from normswap.graph.affine.numbers import Conditions, Numbers
from normswap.passes.edits.base import BaseEdit
from normswap.passes.edits.statistics import check_conditions

# How torch's classes say that they have a gain.
_FLAGS = ("elementwise_affine", "affine")


def gain_and_bias(norm: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The affine y = gain * n + bias after the statistics of a normalization, each (C,)."""
    gain, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if isinstance(gain, Tensor):
        gain = gain.to(dtype)
        return gain, torch.zeros_like(gain) if bias is None else bias.to(dtype)
    assert isinstance(bias, Tensor)
    return torch.ones_like(bias, dtype=dtype), bias.to(dtype)


class OfferGain(BaseEdit):
    """Let weights take up the gain and bias of a normalization; `DropGain` ends it."""

    edit: Literal["offer_gain"] = "offer_gain"
    conditions: Conditions = Conditions()

    def check_numbers(self, model: nn.Module) -> None:
        with torch.no_grad():
            gain, bias = gain_and_bias(self.module(model), torch.float64)
        check_conditions(model, self.site, self.conditions, Numbers(gain, bias, invertible=False))

    def apply(self, model: nn.Module) -> None:
        norm = self.module(model)
        held = {**norm._parameters, **norm._buffers}
        self.require(any(held.get(name) is not None for name in ("weight", "bias")))
        norm.eval_affine = partial(gain_and_bias, norm)  # type: ignore[assignment]

    def __str__(self) -> str:
        return "move its gain and bias"


class DropGain(BaseEdit):
    """Leave a normalization its statistics alone."""

    edit: Literal["drop_gain"] = "drop_gain"

    def apply(self, model: nn.Module) -> None:
        norm = self.module(model)
        self.require("eval_affine" in vars(norm))
        del norm.eval_affine
        for held in (norm._parameters, norm._buffers):
            for name in {"weight", "bias"} & held.keys():
                held[name] = None
        for flag in _FLAGS:
            if hasattr(norm, flag):
                setattr(norm, flag, False)

    def __str__(self) -> str:
        return "its statistics alone"
