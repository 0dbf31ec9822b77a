"""Edits of weights and biases: they parametrize one, take that off again, or bake it in.

`BakeTensor` also bakes what torch computes in a hook: `torch.nn.utils.weight_norm`, `spectral_norm`
and `prune` put a forward pre-hook on a layer that sets its weight from other parameters before
every call. `FoldWhitening` folds the matrix of a decorrelated batch norm into a weight.
"""

from collections.abc import Iterator
from math import prod
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn.utils import parametrize

from normswap.core.originals import kept_on_disk
from normswap.graph.operators.rule import ChannelIndex
from normswap.graph.parametrized import chain_of, in_eval, own_class, parametrized_tensors
from normswap.graph.propagation.rounding import Role, Taking
from normswap.graph.propagation.scale_shift import Conditions, Multiple, ScaleShift
from normswap.norms.batch.frozen import FixedStatistics, scale_and_shift
from normswap.norms.batch.whitening import DecorrelatedBatchNorm
from normswap.norms.hooked import bake_hook, hooked_tensors
from normswap.norms.registry import method_named
from normswap.norms.weight.frozen_affine import (
    AffineParametrization,
    FrozenAffineBias,
    FrozenAffineInputBias,
    FrozenAffineWeight,
)
from normswap.norms.weight.weight_norm import WeightNorm, load_older_names
from normswap.passes.edits.affine import GainAndBias, GivenAffine, InputAffine
from normswap.passes.edits.base import BaseEdit, Effect, computing, gain_and_bias_of, set_tensor
from normswap.passes.edits.statistics import affine_of, check_conditions


class FoldIntoTensor(BaseEdit):
    """Let one tensor of a module carry its share of an affine.

    That is the affine of a frozen BatchNorm; or the gain and bias of another normalization; or one
    that the edit itself has the numbers of.

    Attributes:
        norm: the path of the normalization; "" where there is none.
        of_gain: the affine is the gain and bias after its statistics.
        numbers: those of the affine, where there is no normalization.
        conditions: what was decided by the numbers of a gain and bias.
        role: "weight"; "bias" of an operator before the BatchNorm; "input_bias" of one after it;
            "value", a constant that takes both scale and shift.
        channel_index: where the channels lie in the tensor, or for an input_bias in the weight.
        shift: how often the shift comes in, or how often that of each channel does.
        offset: how often the scale less 1 comes in, too.
        inverse: the affine is taken back.
        given: the bias was given for this.
        weight: the name of the weight beside a bias.
    """

    edit: Literal["fold_into_tensor"] = "fold_into_tensor"
    effect: ClassVar[Effect] = "carries"
    is_step: ClassVar[bool] = True
    tensor: str
    role: Role
    norm: str = ""
    of_gain: bool = False
    numbers: GivenAffine | None = None
    conditions: Conditions = Conditions()
    channel_index: ChannelIndex
    shift: Multiple = 1.0
    offset: Multiple = 0.0
    inverse: bool = False
    given: bool = False
    weight: str = "weight"

    def check_numbers(self, model: nn.Module) -> None:
        _, tensor, norm, share = self._parts(model)
        with torch.no_grad():
            if self.of_gain:
                check_conditions(model, self.norm, self.conditions, affine_of(norm))
            before = share.weight_before() if isinstance(share, FrozenAffineInputBias) else None
            self.require_none(self.taking(affine_of(norm)).why_not(tensor, before))

    def apply(self, model: nn.Module) -> None:
        module, tensor, _, share = self._parts(model)
        if self.given and self.tensor in module._parameters:
            # Nothing trains it: as a Parameter it would be one without a gradient, and
            # torch.autograd.grad of all parameters would fail.
            del module._parameters[self.tensor]
            module.register_buffer(self.tensor, tensor.detach())
        self.parametrize(module, self.tensor, share)

    def _parts(self, model: nn.Module) -> tuple[nn.Module, torch.Tensor, Any, nn.Module]:
        """The module, its tensor, what has the affine, and the parametrization to put on it."""
        module, norm = self.module(model), self._norm(model)
        with in_eval(module), torch.no_grad():
            tensor = getattr(module, self.tensor, None)
            weight = getattr(module, self.weight, None)  # beside a bias
        slotted = weight if self.role == "input_bias" else tensor
        self.require(isinstance(slotted, torch.Tensor) and self.channel_index.fit(slotted))
        counts = {len(each) for each in (self.shift, self.offset) if isinstance(each, tuple)}
        channels = len(scale_and_shift(norm, torch.float64)[0])
        self.require(isinstance(tensor, torch.Tensor) and counts <= {channels})
        assert isinstance(tensor, torch.Tensor)
        share = self._share(module, norm).to(tensor.device)
        return module, tensor, norm, share

    def _norm(self, model: nn.Module) -> Any:
        """What has the affine, as `scale_and_shift` asks for it."""
        if self.numbers is not None:
            self.require(0 < len(self.numbers.scale) == len(self.numbers.shift))
            return InputAffine(self.numbers, computing(self.module(model)).device)
        norm = model.get_submodule(self.norm)
        if self.of_gain:
            self.require(bool(gain_and_bias_of(norm)))
            return GainAndBias(norm)
        self.require(isinstance(norm, FixedStatistics) or hasattr(norm, "eval_affine"))
        return norm

    def taking(self, numbers: ScaleShift) -> Taking:
        """How the tensor folds in an affine of these numbers, to be checked."""
        return Taking(numbers, self.role, self.channel_index, self.shift, self.offset, self.inverse)

    def _share(self, module: nn.Module, norm: Any) -> nn.Module:
        channel_index = (
            norm,
            self.channel_index.shape,
            self.channel_index.channels,
            self.channel_index.view,
        )
        if self.role == "weight":
            return FrozenAffineWeight(*channel_index, inverse=self.inverse)
        affine = {"inverse": self.inverse, "shift": self.shift, "offset": self.offset}
        if self.role == "input_bias":
            return FrozenAffineInputBias(
                *channel_index,
                owner=module,
                weight=self.weight,
                over=self.channel_index.over,
                given=self.given,
                **affine,
            )
        return FrozenAffineBias(*channel_index, given=self.given, **affine)

    def __str__(self) -> str:
        return f"into {self.path}.{self.tensor}"


class ParametrizeTensor(BaseEdit):
    """Let a method of normalization compute a weight (torch's contract of parametrizations)."""

    edit: Literal["parametrize"] = "parametrize"
    effect: ClassVar[Effect] = "adds"
    is_step: ClassVar[bool] = True
    tensor: str
    method: str
    options: dict[str, Any]

    def apply(self, model: nn.Module) -> None:
        module = self.module(model)
        self.require(isinstance(getattr(module, self.tensor, None), torch.Tensor))
        weight = getattr(module, self.tensor)
        trained = weight.requires_grad
        method = method_named(self.method)
        self.require(method.kind == "weight")
        share = method.made(module, self.tensor, **self.options)
        share.to(device=weight.device, dtype=weight.dtype)
        self.parametrize(module, self.tensor, share)
        for parameter in chain_of(module, self.tensor).parameters():
            parameter.requires_grad_(trained)
        if isinstance(share, WeightNorm):
            module.register_load_state_dict_pre_hook(load_older_names)  # type: ignore[no-untyped-call]

    def __str__(self) -> str:
        return f"{self.method} of {self.tensor}"


class BakeTensor(BaseEdit):
    """Replace a tensor that is parametrized, or that a hook computes, by its value."""

    edit: Literal["bake"] = "bake"
    is_step: ClassVar[bool] = True
    tensor: str

    def apply(self, model: nn.Module) -> None:
        module = self.module(model)
        if self.tensor in parametrized_tensors(module):
            self._bake(model, module)
        else:
            self.require(self.tensor in hooked_tensors(module))
            bake_hook(module, self.tensor)

    def _overwritten(self, model: nn.Module, module: nn.Module, chain: Any) -> bool:
        """Bake into the memory of the original; False where that is not to be, or not possible."""
        original = chain.original if chain.is_tensor else None
        if original is None or any(getattr(share, "given", False) for share in chain):
            return False
        owners = sum(
            tensor is original
            for each in model.modules()
            for held in (each._parameters, each._buffers)
            for tensor in held.values()
        )
        with in_eval(module), torch.no_grad():
            value = getattr(module, self.tensor).detach()
            same = value.shape == original.shape and value.dtype == original.dtype
            if owners > 1 or not same or not kept_on_disk(original):
                return False
            original.detach().copy_(value)
            parametrize.remove_parametrizations(module, self.tensor, leave_parametrized=False)
        return True

    def _bake(self, model: nn.Module, module: nn.Module) -> None:
        chain = chain_of(module, self.tensor)
        trained = any(p.requires_grad for p in chain.parameters())
        is_buffer = not list(chain.parameters(recurse=False))
        for share in chain:
            if getattr(share, "given", False):  # zeros, which nothing trained
                assert isinstance(share, AffineParametrization)
                trained = _trains(share.norm)
                is_buffer = False
        own_class(module)
        if self._overwritten(model, module, chain):
            return
        with in_eval(module), torch.no_grad():
            value = getattr(module, self.tensor).detach().clone()
            # leave_parametrized=True would write the value into the original where there is one,
            # and another module may share that.
            parametrize.remove_parametrizations(
                module, self.tensor, leave_parametrized=not chain.is_tensor
            )
        module._buffers.pop(self.tensor, None)  # where torch leaves what had several originals
        if is_buffer:
            module.register_buffer(self.tensor, value)
        else:
            module.register_parameter(self.tensor, nn.Parameter(value, requires_grad=trained))

    def __str__(self) -> str:
        return f"bake {self.path}.{self.tensor}"


def _trains(affine: Any) -> bool:
    """Whether what has an affine has a parameter that trains."""
    norm = affine.norm if isinstance(affine, GainAndBias) else affine
    return isinstance(norm, nn.Module) and any(
        parameter.requires_grad for parameter in norm.parameters(recurse=False)
    )


def bake_hooks(model: nn.Module) -> Iterator[BakeTensor]:
    """The edits that bake every tensor of `model` that a hook computes."""
    for path, module in model.named_modules():
        for tensor in hooked_tensors(module):
            yield BakeTensor(site=path, path=path, tensor=tensor, reason="a hook computes it")


class FoldWhitening(BaseEdit):
    """Let the layer before compute y = D (W x + b) + t, and put an Identity in the place of D.

    W' = D W and b' = D b + t, in float64.

    Attributes:
        aliases: the paths of the normalization.
        tensor, bias: the weight and bias of the layer at `path`, which has both.
        channel_index: where the output channels lie in the weight.
    """

    edit: Literal["fold_whitening"] = "fold_whitening"
    aliases: tuple[str, ...]
    tensor: str
    bias: str
    channel_index: ChannelIndex

    def apply(self, model: nn.Module) -> None:
        layer, norm = self.module(model), model.get_submodule(self.site)
        weight, bias = layer._parameters.get(self.tensor), layer._parameters.get(self.bias)
        self.require(isinstance(norm, DecorrelatedBatchNorm) and norm.running_mean is not None)
        self.require(weight is not None and bias is not None)
        assert isinstance(norm, DecorrelatedBatchNorm) and weight is not None and bias is not None
        channels, shape = norm.num_features, self.channel_index.shape
        self.require(bias.numel() == channels == prod(shape) and weight.dim() == len(shape))
        axes = [i for i, size in enumerate(shape) if size == weight.shape[i] == channels]
        self.require(bool(axes))
        axis = axes[0]
        with torch.no_grad():
            matrix, shift = norm.inference_matrix(torch.float64)
            mixed = torch.tensordot(matrix, weight.double(), dims=([1], [axis])).movedim(0, axis)
            shifted = matrix @ bias.double() + shift
            set_tensor(layer, self.tensor, mixed.to(weight.dtype))
            set_tensor(layer, self.bias, shifted.to(bias.dtype))
        self.put(model, self.aliases, norm, nn.Identity().train(norm.training))

    def __str__(self) -> str:
        return f"into {self.path}.{self.tensor}"
