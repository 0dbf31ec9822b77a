"""Edits that fix the statistics of a BatchNorm, and let them move again.

A batch normalization of somebody else's class becomes a BatchNorm first, in place: what reads
statistics, or computes an affine from them, reads `running_mean`, `running_var`, `weight`, `bias`
and `eps`. Others' classes have other names, or an eps inside their forward.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normswap.core.errors import NormswapError, Unsupported
from normswap.graph.norm_modules import (
    anatomy,
    fixed_statistics,
    formula,
    has_fixed_affine,
    is_foreign,
    speaks_as_torch,
    statistics,
)
from normswap.graph.parametrized import chain_of, own_class, parametrized_tensors
from normswap.graph.propagation.rounding import affine_why_not
from normswap.graph.propagation.scale_shift import Conditions, ScaleShift, digest_of, numbers_of
from normswap.norms.batch.frozen import (
    FixedStatistics,
    FollowedBatchNorm,
    freeze_statistics,
    scale_and_shift,
    thaw_statistics,
)
from normswap.norms.batch.plain import BatchNorm
from normswap.passes.edits.base import BaseEdit, set_tensor


def as_batch_norm(module: nn.Module, *, thaw: bool = False) -> None:
    """Let `module` be a BatchNorm with the same tensors, if it is one of an unknown class.

    Its hooks, its children and its place stay. Where torch's names are its own they stay too, so
    that no state-dict key changes; buffers stay buffers. A frozen one stays frozen.

    Args:
        thaw: it trains from now on: its gain and bias become parameters, its statistics move.

    Raises:
        Unsupported: it computes something else than an affine per channel.
    """
    if not is_foreign(module):
        return
    found = formula(module)
    assert found is not None
    if found.variance is None:
        raise Unsupported("has no running statistics")
    if speaks_as_torch(module, found) and not thaw:
        return
    tail = anatomy(module).tail
    variance = _vector(module, found.variance)
    mean = torch.zeros_like(variance) if found.mean is None else _vector(module, found.mean)
    affine = {"weight": found.gain, "bias": found.bias}
    tensors = {role: _vector(module, name) for role, name in affine.items() if name is not None}
    if found.gain_offset:
        gain = tensors["weight"]
        tensors["weight"] = nn.Parameter(gain.detach() + found.gain_offset, gain.requires_grad)
    norm = BatchNorm(len(variance), found.eps, affine=False, device="meta")
    norm.affine = bool(tensors)
    children = dict(module._modules)
    state = {name: value for name, value in vars(module).items() if name in _OF_EVERY_MODULE}
    vars(module).clear()
    vars(module).update({**vars(norm), **state})
    module._parameters, module._buffers, module._modules = {}, {}, children
    module.__class__ = FollowedBatchNorm if tail else BatchNorm
    if tail:
        module.then = tail  # type: ignore[assignment]
    for role in ("weight", "bias"):
        tensor = tensors.get(role)
        if thaw and tensor is not None:
            module.register_parameter(role, nn.Parameter(tensor.detach()))
        elif tensor is None or isinstance(tensor, nn.Parameter):
            module.register_parameter(role, tensor)
        else:
            module.register_buffer(role, tensor)
    module.register_buffer("running_mean", mean)
    module.register_buffer("running_var", variance)
    module.register_buffer("num_batches_tracked", None)
    if found.frozen and not thaw:
        freeze_statistics(module)


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _vector(module: nn.Module, name: str) -> Tensor:
    tensor: Tensor = getattr(module, name)
    if tensor.dim() == 1:
        return tensor
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach().flatten(), tensor.requires_grad)
    return tensor.flatten()


def check_conditions(
    model: nn.Module, site: str, conditions: Conditions, numbers: ScaleShift | None
) -> None:
    """Raise where what a plan was decided by does not hold for the numbers of today.

    Raises:
        NormswapError: it does not.
    """
    broken = None if numbers is None else conditions.broken_by(numbers)
    changed = (
        f"{name} has changed"
        for name, digest in dict.fromkeys(conditions.constants)
        if not _has_digest(model, name, digest)
    )
    broken = broken or next(changed, None)
    if broken is not None:
        raise NormswapError(
            f"the plan was made when {site} had other numbers: {broken}; plan it anew"
        )


def _has_digest(model: nn.Module, name: str, digest: str) -> bool:
    owner, _, attribute = name.rpartition(".")
    tensor = getattr(model.get_submodule(owner), attribute, None)
    return isinstance(tensor, torch.Tensor) and digest_of(tensor) == digest


def affine_of(norm: Any) -> ScaleShift:
    """The affine of `norm` in eval mode, whatever its formula is."""
    numbers = numbers_of(norm)
    if numbers is not None:
        return numbers
    scale, shift = scale_and_shift(norm, torch.float64)
    return ScaleShift(scale.detach(), shift.detach(), invertible=False)


def into_affine_why_not(norm: nn.Module) -> str | None:
    """Why a scale and shift in the dtype of `norm` cannot compute it; None where they can."""
    held = fixed_statistics(norm)
    tensor = held[1] if held is not None else norm.running_mean
    assert isinstance(tensor, torch.Tensor)
    return None if tensor.is_meta else affine_why_not(affine_of(norm), tensor.dtype)


class FreezeStatistics(BaseEdit):
    """Fix the running statistics; `folded` says that a weight computes the affine from now on.

    Attributes:
        conditions: of the affine that moves, by which it was decided where.
    """

    edit: Literal["freeze"] = "freeze"
    folded: bool = False
    tail: tuple[str, ...] = ()
    conditions: Conditions = Conditions()

    def check_numbers(self, model: nn.Module) -> None:
        numbers = numbers_of(self.module(model)) if self.folded else None
        check_conditions(model, self.site, self.conditions, numbers)

    def apply(self, model: nn.Module) -> None:
        module = self.module(model)
        self.require(has_fixed_affine(module))
        as_batch_norm(module)
        self.require(module._modules.keys() >= set(self.tail))  # it is going to call them
        freeze_statistics(module, folded=self.folded, tail=self.tail)

    def __str__(self) -> str:
        return "freeze, computed by the weight" if self.folded else "freeze"


class StatisticsIntoAffine(BaseEdit):
    """Let the weight and bias of a BatchNorm be its whole affine: mean 0, variance 1, eps 0."""

    edit: Literal["statistics_into_affine"] = "statistics_into_affine"

    def check_numbers(self, model: nn.Module) -> None:
        self.require_none(into_affine_why_not(self.module(model)))

    def apply(self, model: nn.Module) -> None:
        module = self.module(model)
        self.require(has_fixed_affine(module))
        as_batch_norm(module)
        with torch.no_grad():
            scale, shift = scale_and_shift(module, torch.float64)
            mean = module.running_mean
            assert isinstance(mean, Tensor)
            set_tensor(module, "weight", scale.to(mean.dtype))
            set_tensor(module, "bias", shift.to(mean.dtype))
        empty_statistics(module)

    def __str__(self) -> str:
        return "its statistics into its weight and bias"


def empty_statistics(norm: nn.Module) -> None:
    """Let the weight and bias of a BatchNorm be all of its affine."""
    mean, variance = norm.running_mean, norm.running_var
    assert isinstance(mean, Tensor) and isinstance(variance, Tensor)
    # New ones, because the model may have to be put back.
    norm.running_mean, norm.running_var = torch.zeros_like(mean), torch.ones_like(variance)
    norm.eps = 0.0  # type: ignore[assignment]


class ThawStatistics(BaseEdit):
    """Let a frozen BatchNorm train again, once its affine is taken off the tensors that carry it.

    One that a class of somebody else's keeps frozen becomes a BatchNorm with the same tensors.

    Attributes:
        carriers: these tensors, as (module path, tensor name).
    """

    edit: Literal["thaw"] = "thaw"
    carriers: tuple[tuple[str, str], ...] = ()

    def apply(self, model: nn.Module) -> None:
        module, training = self.module(model), self.training(model)
        self.require(has_fixed_affine(module))
        for path, tensor in self.carriers:
            self._release(self.module(model, path), tensor, module)
        if isinstance(module, FixedStatistics):
            thaw_statistics(module, training=training)
        else:
            self.require(statistics(module, "batch") == "frozen")
            as_batch_norm(module, thaw=True)

    def _release(self, module: nn.Module, tensor: str, norm: nn.Module) -> None:
        """Take the affine of `norm` off a tensor of `module` again."""
        self.require(tensor in parametrized_tensors(module))
        chain = chain_of(module, tensor)
        own = [i for i, each in enumerate(chain) if getattr(each, "norm", None) is norm]
        self.require(len(own) == 1)
        share = chain[own[0]]
        own_class(module)
        if len(chain) > 1:
            del chain[own[0]]
            return
        parametrize.remove_parametrizations(module, tensor, leave_parametrized=False)
        if getattr(share, "given", False):
            del module._buffers[tensor]
            module.register_parameter(tensor, None)

    def __str__(self) -> str:
        return "; ".join([*(f"out of {path}.{name}" for path, name in self.carriers), "thaw"])
