"""The edits that a plan consists of: data that can be printed, stored and carried out.

Each names the site it concerns and the reason. `apply` changes one place of the module tree; it may
fail half-way, because the plan restores the model then.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.nn.utils import parametrize

from normswap.errors import NormswapError
from normswap.graph.norm_modules import norm_kind
from normswap.norms.axis import ChannelsLast
from normswap.norms.batch.frozen import FrozenStatistics, freeze_statistics, thaw_statistics
from normswap.norms.registry import create, method_named
from normswap.norms.weight.frozen_affine import FrozenAffineBias, FrozenAffineWeight

# Hooks on the forward and backward of a module, which its replacement inherits.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


class _Edit(BaseModel):
    """What every edit says of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    site: str
    path: str
    reason: str

    def module(self, model: nn.Module) -> nn.Module:
        """The module this edit concerns.

        Raises:
            NormswapError: the model has none at that path.
        """
        try:
            return model.get_submodule(self.path)
        except AttributeError as error:
            raise NormswapError(
                f"the plan names {self.path!r}, which this model does not have; plan it anew"
            ) from error

    def require(self, fits: bool) -> None:
        """Raise NormswapError unless what the plan says of the module is so."""
        if not fits:
            raise NormswapError(
                f"the plan was made for another model: {self.path!r} is not what it expects there; "
                "plan it anew"
            )

    def training(self, model: nn.Module) -> bool:
        """The training flag of the module, or of its parent where a freeze has pinned its own."""
        module = self.module(model)
        if isinstance(module, FrozenStatistics):
            module = model.get_submodule(self.path.rpartition(".")[0])
        return module.training


class ReplaceModule(_Edit):
    """Put a module of another method in the place of a normalization."""

    edit: Literal["replace"] = "replace"
    aliases: tuple[str, ...]
    method: str
    num_features: int
    channel_axis: int
    options: dict[str, Any]
    tail: tuple[str, ...]

    def apply(self, model: nn.Module) -> None:
        old = self.module(model)
        self.require(norm_kind(old) is not None)
        per_channel = (getattr(old, name, None) for name in ("weight", "bias", "running_mean"))
        self.require(all(t.numel() == self.num_features for t in per_channel if t is not None))
        norm = self._build()
        _carry_over(old, norm)
        adopt = method_named(self.method).adopt
        if adopt is not None:
            with torch.no_grad():
                adopt(norm.norm if isinstance(norm, ChannelsLast) else norm, old)
        norm.train(self.training(model))
        new: nn.Module = norm
        if self.tail:
            parts = {"norm": norm, **{name: getattr(old, name) for name in self.tail}}
            new = nn.Sequential()
            for name, part in parts.items():
                new.add_module(name, part)
            new.training = norm.training
        _inherit_hooks(old, new)
        for path in self.aliases:
            model.set_submodule(path, new)

    def _build(self) -> nn.Module:
        takes_axis = "channel_axis" in method_named(self.method).options
        axis = {"channel_axis": self.channel_axis} if takes_axis else {}
        norm = create(self.method, self.num_features, **self.options, **axis)
        return norm if takes_axis or self.channel_axis == 1 else ChannelsLast(norm)

    def __str__(self) -> str:
        options = ", ".join(f"{k}={v}" for k, v in self.options.items() if k in _WORTH_SAYING)
        return f"{self.method}({options})" if options else self.method


_WORTH_SAYING = ("groups", "per_position")


class FreezeStatistics(_Edit):
    """Fix the running statistics; `absorbed` says that a weight computes the affine from now on."""

    edit: Literal["freeze"] = "freeze"
    absorbed: bool = False
    tail: tuple[str, ...] = ()

    def apply(self, model: nn.Module) -> None:
        module = self.module(model)
        self.require(norm_kind(module) == "batch" and module.running_mean is not None)
        freeze_statistics(module, absorbed=self.absorbed, tail=self.tail)

    def __str__(self) -> str:
        return "freeze, computed by the weight" if self.absorbed else "freeze"


class ThawStatistics(_Edit):
    """Let a frozen BatchNorm train again."""

    edit: Literal["thaw"] = "thaw"

    def apply(self, model: nn.Module) -> None:
        self.require(isinstance(self.module(model), FrozenStatistics))
        thaw_statistics(self.module(model), training=self.training(model))

    def __str__(self) -> str:
        return "thaw"


class GiveBias(_Edit):
    """Give a conv or Linear a bias of zeros, which nothing trains."""

    edit: Literal["give_bias"] = "give_bias"
    channels: int

    def apply(self, model: nn.Module) -> None:
        module = self.module(model)
        self.require(module._parameters.get("bias", module) is None)
        like = next(iter([*module.parameters(), *module.buffers()]))
        zeros = torch.zeros(self.channels, dtype=like.dtype, device=like.device)
        module.bias = nn.Parameter(zeros, requires_grad=False)

    def __str__(self) -> str:
        return f"give {self.path} a bias"


class AbsorbAffine(_Edit):
    """Let one tensor of a module carry its share of a frozen BatchNorm's affine."""

    edit: Literal["absorb"] = "absorb"
    tensor: str
    role: Literal["weight", "bias"]
    norm: str
    groups: int = 0
    given: bool = False

    def apply(self, model: nn.Module) -> None:
        module, norm = self.module(model), model.get_submodule(self.norm)
        self.require(isinstance(norm, FrozenStatistics) and self._slots(module) == _channels(norm))
        share: nn.Module = (
            FrozenAffineWeight(norm, self.groups)
            if self.role == "weight"
            else FrozenAffineBias(norm, self.given)
        )
        share.train(module.training)
        _own_class(module)
        with _in_eval(module):
            parametrize.register_parametrization(module, self.tensor, share)

    def _slots(self, module: nn.Module) -> int:
        """How many output channels the tensor has."""
        with _in_eval(module), torch.no_grad():
            tensor = getattr(module, self.tensor, None)
        if not isinstance(tensor, torch.Tensor) or not tensor.dim():
            return 0
        transposed = self.role == "weight" and self.groups
        return tensor.shape[1] * self.groups if transposed else tensor.shape[0]

    def __str__(self) -> str:
        return f"into {self.path}.{self.tensor}"


class ReleaseAffine(_Edit):
    """Take the affine of a frozen BatchNorm off a tensor again."""

    edit: Literal["release"] = "release"
    tensor: str

    def apply(self, model: nn.Module) -> None:
        module = self.module(model)
        self.require(self.tensor in parametrized_tensors(module))
        chain, norm = chain_of(module, self.tensor), model.get_submodule(self.site)
        own = [i for i, each in enumerate(chain) if getattr(each, "norm", None) is norm]
        self.require(len(own) == 1)
        share = chain[own[0]]
        _own_class(module)
        if len(chain) > 1:
            del chain[own[0]]
            return
        parametrize.remove_parametrizations(module, self.tensor, leave_parametrized=False)
        if getattr(share, "given", False):
            module.register_parameter("bias", None)

    def __str__(self) -> str:
        return f"out of {self.path}.{self.tensor}"


class BakeTensor(_Edit):
    """Replace a parametrized tensor by its value."""

    edit: Literal["bake"] = "bake"
    tensor: str

    def apply(self, model: nn.Module) -> None:
        module = self.module(model)
        self.require(self.tensor in parametrized_tensors(module))
        chain = chain_of(module, self.tensor)
        trained = any(p.requires_grad for p in chain.parameters())
        for share in chain:
            if isinstance(share, FrozenAffineBias) and share.given:  # zeros, which nothing trained
                trained = any(p.requires_grad for p in share.norm.parameters(recurse=False))
        _own_class(module)
        with _in_eval(module), torch.no_grad():
            value = getattr(module, self.tensor).detach().clone()
            # leave_parametrized=True would write the value into the original where there is one,
            # and another module may share that.
            parametrize.remove_parametrizations(
                module, self.tensor, leave_parametrized=not chain.is_tensor
            )
        if self.tensor in module._buffers:
            module._buffers[self.tensor] = value
        else:
            module.register_parameter(self.tensor, nn.Parameter(value, requires_grad=trained))

    def __str__(self) -> str:
        return f"bake {self.path}.{self.tensor}"


class ToIdentity(_Edit):
    """Remove a normalization that nothing computes any more; what it held besides stays."""

    edit: Literal["identity"] = "identity"
    aliases: tuple[str, ...]
    tail: tuple[str, ...] = ()

    def apply(self, model: nn.Module) -> None:
        old = self.module(model)
        self.require(isinstance(old, FrozenStatistics) and old.absorbed)
        new: nn.Module = nn.Identity()
        if self.tail:
            new = nn.Sequential()
            for name in self.tail:
                new.add_module(name, getattr(old, name))
        new.training = self.training(model)
        _inherit_hooks(old, new)
        for path in self.aliases:
            model.set_submodule(path, new)

    def __str__(self) -> str:
        return "remove"


Edit = Annotated[
    ReplaceModule
    | FreezeStatistics
    | ThawStatistics
    | GiveBias
    | AbsorbAffine
    | ReleaseAffine
    | BakeTensor
    | ToIdentity,
    Field(discriminator="edit"),
]


def _carry_over(old: nn.Module, new: nn.Module) -> None:
    """Move what both modules have: parameters and statistics, dtype and device."""
    source: Mapping[str, torch.Tensor] = dict(old.named_parameters(recurse=False)) | dict(
        old.named_buffers(recurse=False)
    )
    source = {**source, **{name: getattr(old, name) for name in parametrized_tensors(old)}}
    like = next((t for t in source.values() if t.is_floating_point()), None)
    if like is not None:
        new.to(device=like.device, dtype=like.dtype)
    receiver = new.norm if isinstance(new, ChannelsLast) else new
    for name, parameter in receiver.named_parameters(recurse=False):
        given = source.get(name)
        if given is not None and given.shape == parameter.shape:
            carried = nn.Parameter(given.detach().clone(), requires_grad=given.requires_grad)
            setattr(receiver, name, carried)
    for name, _ in receiver.named_buffers(recurse=False):
        if name in source:
            setattr(receiver, name, source[name].detach().clone())


def parametrized_tensors(module: nn.Module) -> list[str]:
    """The names of the tensors of `module` that are parametrized."""
    if not parametrize.is_parametrized(module):
        return []
    assert isinstance(module.parametrizations, nn.ModuleDict)
    return list(module.parametrizations)


def chain_of(module: nn.Module, tensor: str) -> parametrize.ParametrizationList:
    """The parametrizations of one tensor, first to last."""
    chain = module.parametrizations[tensor]  # type: ignore[index]
    assert isinstance(chain, parametrize.ParametrizationList)
    return chain


def _own_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own.

    torch keeps the property of a parametrized tensor on a class made for the module, but a deep
    copy shares that class: changing the parametrizations of one would break the other.
    """
    if parametrize.is_parametrized(module):
        cls = type(module)
        module.__class__ = type(cls.__name__, cls.__bases__, dict(vars(cls)))


def _channels(norm: nn.Module) -> int:
    assert isinstance(norm.running_mean, torch.Tensor)
    return norm.running_mean.numel()


@contextmanager
def _in_eval(module: nn.Module) -> Iterator[None]:
    """With the flags of eval mode: in training, reading a spectral_norm goes on estimating."""
    flags = [(each, each.training) for each in module.modules()]
    for each, _ in flags:
        each.training = False
    try:
        yield
    finally:
        for each, training in flags:
            each.training = training


def _inherit_hooks(old: nn.Module, new: nn.Module) -> None:
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))
