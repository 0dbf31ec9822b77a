"""Edits that put another module in the place of a normalization, or of a recurrent network."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from normswap.graph.norm_modules import has_fixed_affine, norm_kind
from normswap.graph.parametrized import parametrized_tensors
from normswap.norms.batch.frozen import FixedStatistics, scale_and_shift
from normswap.norms.batch.mean_only import MeanOnlyBatchNorm
from normswap.norms.calling import ChannelsLast
from normswap.norms.hooked import bake_hook, hooked_tensors
from normswap.norms.pointwise.channel_affine import ChannelAffine, ChannelShift
from normswap.norms.registry import create, method_named
from normswap.passes.edits.affine import is_bare
from normswap.passes.edits.base import BaseEdit, Count, Effect, gain_and_bias_of
from normswap.passes.edits.statistics import as_batch_norm, into_affine_why_not

# Options that tell one result from another at a glance.
_WORTH_SAYING = ("groups", "per_position")


class ReplaceModule(BaseEdit):
    """Put a module of another method in the place of a normalization.

    Where the scale of a BatchNorm is in the weight before, that is a mean-only BatchNorm. With
    y = s z + t the affine of the BatchNorm, its input is s z by now, or y where t was folded into a
    bias as well. The new running mean is such that the function in eval mode stays: with the bias
    beta of both, s z - (beta - t) + beta = y.

    Attributes:
        aliases: every path of the normalization.
        tail: children that it applies to the normalized value.
        shift_folded: whether t was folded; None where s is not.
    """

    edit: Literal["replace"] = "replace"
    aliases: tuple[str, ...]
    method: str
    num_features: Count
    channel_axis: int
    options: dict[str, Any]
    tail: tuple[str, ...]
    shift_folded: bool | None = None

    @property
    def effect(self) -> Effect:
        return "prepares" if self.shift_folded is None else "adds"

    @property
    def is_called(self) -> bool:
        return True

    def apply(self, model: nn.Module) -> None:
        old = self.module(model)
        self.require(norm_kind(old) is not None)
        self.require(self.shift_folded is None or _is_folded(old))
        for name in hooked_tensors(old):  # the new module has not what the hook computes it from
            bake_hook(old, name)
        if has_fixed_affine(old):
            as_batch_norm(old)
        per_channel = (getattr(old, name, None) for name in ("weight", "bias", "running_mean"))
        self.require(all(t.numel() == self.num_features for t in per_channel if t is not None))
        built = self.build()
        norm = built.norm if isinstance(built, ChannelsLast) else built
        _carry_over(old, built, norm, _nearest(model, self.path))
        adopt = method_named(self.method).adopt
        with torch.no_grad():
            if adopt is not None:
                adopt(norm, old)
            if self.shift_folded is not None:
                self.require(isinstance(norm, MeanOnlyBatchNorm))
                assert isinstance(norm, MeanOnlyBatchNorm)
                norm.running_mean.copy_(_mean_instead(old, self.shift_folded))
        built.train(self.training(model))
        new = _with_tail(built, old, self.tail)
        new.training = built.training
        self.put(model, self.aliases, old, new)

    def build(self) -> nn.Module:
        """The new normalization, as its method starts it."""
        takes_axis = "channel_axis" in method_named(self.method).options
        axis = {"channel_axis": self.channel_axis} if takes_axis else {}
        norm = create(self.method, self.num_features, **self.options, **axis)
        return norm if takes_axis or self.channel_axis == 1 else ChannelsLast(norm)

    def __str__(self) -> str:
        options = ", ".join(f"{k}={v}" for k, v in self.options.items() if k in _WORTH_SAYING)
        return f"{self.method}({options})" if options else self.method


def _is_folded(norm: nn.Module) -> bool:
    return isinstance(norm, FixedStatistics) and norm.folded


def _mean_instead(old: Any, shift_folded: bool) -> Tensor:
    """The running mean of the mean-only BatchNorm in the place of a folded one."""
    _, shift = scale_and_shift(old, torch.float64)
    bias = torch.zeros_like(shift) if old.bias is None else old.bias.to(shift.dtype)
    return bias if shift_folded else bias - shift


def _nearest(model: nn.Module, path: str) -> Tensor | None:
    """A floating-point parameter or buffer of the smallest part of `model` around `path`."""
    while path:
        path = path.rpartition(".")[0]
        around = model.get_submodule(path)
        for tensor in (*around.parameters(), *around.buffers()):
            if tensor.is_floating_point():
                return tensor
    return None


def _carry_over(
    old: nn.Module, new: nn.Module, receiver: nn.Module, nearest: Tensor | None
) -> None:
    """Move what both modules have: parameters and statistics, dtype and device.

    Args:
        receiver: the normalization in `new`.
        nearest: a tensor that has dtype and device, where `old` has none.
    """
    source: Mapping[str, Tensor] = dict(old.named_parameters(recurse=False)) | dict(
        old.named_buffers(recurse=False)
    )
    source = {**source, **{name: getattr(old, name) for name in parametrized_tensors(old)}}
    source = {**source, **gain_and_bias_of(old)}
    like = next((t for t in source.values() if t.is_floating_point()), nearest)
    if like is not None:
        new.to(device=like.device, dtype=like.dtype)
    for name, parameter in receiver.named_parameters(recurse=False):
        given = source.get(name)
        if given is not None and given.shape == parameter.shape:
            carried = nn.Parameter(given.detach().clone(), requires_grad=given.requires_grad)
            setattr(receiver, name, carried)
    for name, _ in receiver.named_buffers(recurse=False):
        if name in source:
            setattr(receiver, name, source[name].detach().clone())


class Reduce(BaseEdit):
    """Leave of a BatchNorm with fixed statistics what no weight computes; its other children stay.

    Of an RMSNorm without gain and bias, which others make redundant, it leaves the identity.

    Attributes:
        to: its "affine"; a "shift", where the scale is in the weight before; or the "identity".
        aliases: every path of the normalization.
        tail: children that it applies to the normalized value.
        deviation: how far that moves the outputs of the model, as was measured, relative to the
            largest value of each.
    """

    edit: Literal["reduce"] = "reduce"
    to: Literal["affine", "shift", "identity"]
    aliases: tuple[str, ...]
    num_features: Count | None = None
    tail: tuple[str, ...] = ()
    deviation: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0

    @property
    def effect(self) -> Effect:
        return "removes" if self.to == "identity" else "leaves"

    @property
    def is_step(self) -> bool:
        return self.to == "identity"

    @property
    def is_called(self) -> bool:
        return self.to == "affine"

    def check_numbers(self, model: nn.Module) -> None:
        old = self.module(model)
        if self.to == "affine" and has_fixed_affine(old):
            self.require_none(into_affine_why_not(old))
        if self.to == "identity" and norm_kind(old) == "rms":
            self.require(is_bare(old))

    def apply(self, model: nn.Module) -> None:
        old = self.module(model)
        if self.to == "affine":
            self.require(has_fixed_affine(old) and not getattr(old, "folded", False))
            as_batch_norm(old)
        else:
            self.require(_is_folded(old) or (self.to == "identity" and norm_kind(old) == "rms"))
        left = None if self.to == "identity" else self._left(old)
        new = _with_tail(left, old, self.tail)
        new.training = self.training(model)
        if left is not None:
            left.training = new.training
        self.put(model, self.aliases, old, new)

    def _left(self, old: nn.Module) -> nn.Module:
        like = old.running_mean
        self.require(isinstance(like, Tensor) and like.numel() == self.num_features)
        assert isinstance(like, Tensor)
        cls = ChannelAffine if self.to == "affine" else ChannelShift
        left = cls(like.numel(), device=like.device, dtype=like.dtype)
        with torch.no_grad():
            scale, shift = scale_and_shift(old, torch.float64)
            for name, parameter in left.named_parameters():
                parameter.copy_(scale if name == "weight" else shift)
                before = getattr(old, name, None)
                trains = isinstance(before, nn.Parameter) and before.requires_grad
                parameter.requires_grad_(trains)
        return left

    def __str__(self) -> str:
        return {
            "affine": "one scale and shift per channel",
            "shift": "one shift per channel",
            "identity": "remove",
        }[self.to]


def promised(edits: Iterable[BaseEdit]) -> float:
    """How far `edits` move the outputs of a model beyond rounding, as was measured."""
    return sum((edit.deviation for edit in edits if isinstance(edit, Reduce)), 0.0)


def _with_tail(norm: nn.Module | None, old: nn.Module, tail: tuple[str, ...]) -> nn.Module:
    """`norm`, followed by what `old` applied to the normalized value."""
    if not tail:
        return nn.Identity() if norm is None else norm
    parts = {} if norm is None else {"norm": norm}
    return nn.Sequential(OrderedDict({**parts, **{name: getattr(old, name) for name in tail}}))


class ReplaceRecurrentModule(BaseEdit):
    """Replace an `nn.RNN`, `nn.LSTM` or `nn.GRU`, whose weights the new module takes over."""

    edit: Literal["replace_recurrent"] = "replace_recurrent"
    aliases: tuple[str, ...]
    method: str
    options: dict[str, Any]

    @property
    def is_called(self) -> bool:
        return True

    def apply(self, model: nn.Module) -> None:
        old = self.module(model)
        method = method_named(self.method)
        self.require(isinstance(old, nn.RNNBase) and method.kind == "recurrent")
        new = method.made(old, **self.options)
        for name, weight in old.named_parameters(recurse=False):
            setattr(new, name, weight)  # itself, as another network may have it too
        new.train(old.training)
        self.put(model, self.aliases, old, new)

    def __str__(self) -> str:
        return self.method
