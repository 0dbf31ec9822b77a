"""Edits that put another module in the place of a normalization, or of a recurrent network."""

from typing import Any, ClassVar, Literal

import torch
from torch import nn

from normswap.graph.norm_modules import has_fixed_affine, norm_kind
from normswap.norms.batch.frozen import FixedStatistics, scale_and_shift
from normswap.norms.calling import ChannelsLast
from normswap.norms.hooked import bake_hook, hooked_tensors
from normswap.norms.pointwise.channel_affine import ChannelAffine, ChannelShift
from normswap.norms.registry import create, method_named
from normswap.passes.edits.base import BaseEdit, Count, Effect, carry_over, inherit_hooks
from normswap.passes.edits.statistics import as_batch_norm, into_affine_why_not

# Options that tell one result from another at a glance.
_WORTH_SAYING = ("groups", "per_position")


class ReplaceModule(BaseEdit):
    """Put a module of another method in the place of a normalization."""

    edit: Literal["replace"] = "replace"
    effect: ClassVar[Effect] = "prepares"
    aliases: tuple[str, ...]
    method: str
    num_features: Count
    channel_axis: int
    options: dict[str, Any]
    tail: tuple[str, ...]

    def apply(self, model: nn.Module) -> None:
        old = self.module(model)
        self.require(norm_kind(old) is not None)
        for name in hooked_tensors(old):  # the new module has not what the hook computes it from
            bake_hook(old, name)
        if has_fixed_affine(old):
            as_batch_norm(old)
        per_channel = (getattr(old, name, None) for name in ("weight", "bias", "running_mean"))
        self.require(all(t.numel() == self.num_features for t in per_channel if t is not None))
        norm = self.build()
        carry_over(old, norm)
        adopt = method_named(self.method).adopt
        if adopt is not None:
            with torch.no_grad():
                adopt(norm.norm if isinstance(norm, ChannelsLast) else norm, old)
        norm.train(self.training(model))
        new = _with_tail(norm, old, self.tail)
        new.training = norm.training
        inherit_hooks(old, new)
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


class ReplaceByCentering(ReplaceModule):
    """Put a mean-only BatchNorm in the place of a BatchNorm whose scale is in the weight before.

    With y = s z + t the affine of the BatchNorm, its input is s z by now, or y where t was folded
    into a bias as well. The new running mean is such that the function in eval mode stays: with the
    bias beta of both, s z - (beta - t) + beta = y.
    """

    edit: Literal["replace_by_centering"] = "replace_by_centering"  # type: ignore[assignment]
    effect: ClassVar[Effect] = "adds"
    shift_folded: bool

    def apply(self, model: nn.Module) -> None:
        old = self.module(model)
        self.require(isinstance(old, FixedStatistics) and old.folded)
        with torch.no_grad():
            _, shift = scale_and_shift(old, torch.float64)
            bias = torch.zeros_like(shift)
            if isinstance(old.bias, torch.Tensor):
                bias = old.bias.detach().to(shift.dtype)
        super().apply(model)
        mean = bias if self.shift_folded else bias - shift
        for name, buffer in model.get_submodule(self.path).named_buffers():
            if name.endswith("running_mean"):  # its own, or in a Sequential with what follows
                buffer.copy_(mean)


class ToAffine(BaseEdit):
    """Put a scale and a shift in the place of a BatchNorm with fixed statistics."""

    edit: Literal["affine"] = "affine"
    aliases: tuple[str, ...]
    num_features: Count
    tail: tuple[str, ...] = ()

    def check_numbers(self, model: nn.Module) -> None:
        old = self.module(model)
        if has_fixed_affine(old):
            self.require_none(into_affine_why_not(old))

    def apply(self, model: nn.Module) -> None:
        old = self.module(model)
        self.require(has_fixed_affine(old) and not getattr(old, "folded", False))
        as_batch_norm(old)
        like = old.running_mean
        self.require(isinstance(like, torch.Tensor) and like.numel() == self.num_features)
        assert isinstance(like, torch.Tensor)
        affine = ChannelAffine(self.num_features, device=like.device, dtype=like.dtype)
        with torch.no_grad():
            scale, shift = scale_and_shift(old, torch.float64)
            affine.weight.copy_(scale)
            affine.bias.copy_(shift)
        for name, parameter in affine.named_parameters():
            before = getattr(old, name, None)
            parameter.requires_grad_(isinstance(before, nn.Parameter) and before.requires_grad)
        new = _with_tail(affine, old, self.tail)
        for module in (affine, new):
            module.training = self.training(model)
        inherit_hooks(old, new)
        self.put(model, self.aliases, old, new)

    def __str__(self) -> str:
        return "one scale and shift per channel"


class ToIdentity(BaseEdit):
    """Remove a normalization that nothing computes any more; what it held besides stays."""

    edit: Literal["identity"] = "identity"
    effect: ClassVar[Effect] = "removes"
    is_step: ClassVar[bool] = True
    aliases: tuple[str, ...]
    tail: tuple[str, ...] = ()

    def apply(self, model: nn.Module) -> None:
        old = self.module(model)
        self.require(isinstance(old, FixedStatistics) and old.folded)
        new: nn.Module = nn.Identity()
        if self.tail:
            new = nn.Sequential()
            for name in self.tail:
                new.add_module(name, getattr(old, name))
        new.training = self.training(model)
        inherit_hooks(old, new)
        self.put(model, self.aliases, old, new)

    def __str__(self) -> str:
        return "remove"


class ToShift(BaseEdit):
    """Put an added constant in the place of a BatchNorm whose scale is in the weight before."""

    edit: Literal["shift"] = "shift"
    effect: ClassVar[Effect] = "leaves"
    aliases: tuple[str, ...]
    num_features: Count
    tail: tuple[str, ...] = ()

    def apply(self, model: nn.Module) -> None:
        old = self.module(model)
        self.require(isinstance(old, FixedStatistics) and old.folded)
        like = old.running_mean
        self.require(isinstance(like, torch.Tensor) and like.numel() == self.num_features)
        assert isinstance(like, torch.Tensor)
        shift = ChannelShift(self.num_features, device=like.device, dtype=like.dtype)
        with torch.no_grad():
            shift.bias.copy_(scale_and_shift(old, torch.float64)[1])
        before = getattr(old, "bias", None)
        shift.bias.requires_grad_(isinstance(before, nn.Parameter) and before.requires_grad)
        new = _with_tail(shift, old, self.tail)
        for module in (shift, new):
            module.training = self.training(model)
        inherit_hooks(old, new)
        self.put(model, self.aliases, old, new)

    def __str__(self) -> str:
        return "one shift per channel"


def _with_tail(norm: nn.Module, old: nn.Module, tail: tuple[str, ...]) -> nn.Module:
    """`norm`, followed by what `old` applied to the normalized value."""
    if not tail:
        return norm
    new = nn.Sequential()
    for name, part in {"norm": norm, **{name: getattr(old, name) for name in tail}}.items():
        new.add_module(name, part)
    return new


class ReplaceRecurrentModule(BaseEdit):
    """Replace an `nn.RNN`, `nn.LSTM` or `nn.GRU`, whose weights the new module takes over."""

    edit: Literal["replace_recurrent"] = "replace_recurrent"
    aliases: tuple[str, ...]
    method: str
    options: dict[str, Any]

    def apply(self, model: nn.Module) -> None:
        old = self.module(model)
        method = method_named(self.method)
        self.require(isinstance(old, nn.RNNBase) and method.kind == "recurrent")
        new = method.made(old, **self.options)
        for name, weight in old.named_parameters(recurse=False):
            setattr(new, name, weight)  # itself, as another network may have it too
        new.train(old.training)
        inherit_hooks(old, new)
        self.put(model, self.aliases, old, new)

    def __str__(self) -> str:
        return self.method
