"""Normalization modules: which kind one is, and what it does besides normalizing.

torch's classes are known, subclasses included, and a class may declare what it is: `norm_kind`, and
`channel_axis` where that is not 1, as those of `normswap.norms` do and third parties' may. Any
other module, and a subclass with a forward of its own, is what it computes
(`normswap.graph.recognition`): torchvision's FrozenBatchNorm2d and its many copies, a LlamaRMSNorm,
timm's BatchNormAct2d, which goes on with a drop and an activation.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import isclose
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normswap.core.compat import AnyBatchNorm, AnyInstanceNorm
from normswap.core.errors import Unsupported
from normswap.core.mixins import Mixin
from normswap.graph.recognition import Formula, recognized

# "batch" for one affine per channel in eval mode, which can be folded and frozen; "group", "layer",
# "instance", "rms", "local_response", or what the class of a module declares.
NormKind = str
Statistics = Literal["running", "batch", "frozen", "sample"]

_KINDS: tuple[tuple[type[nn.Module], NormKind], ...] = (
    (AnyBatchNorm, "batch"),
    (AnyInstanceNorm, "instance"),
    (nn.GroupNorm, "group"),
    (nn.LayerNorm, "layer"),
    (nn.RMSNorm, "rms"),
    (nn.LocalResponseNorm, "local_response"),
)


@dataclass(frozen=True)
class Anatomy:
    """What a normalization module consists of.

    Attributes:
        channel_axis: the axis of its channels, 1 or -1.
        tail: names of the children it applies to the normalized value, in order.
    """

    channel_axis: int
    tail: tuple[str, ...] = ()


def norm_kind(module: nn.Module) -> NormKind | None:
    """The kind of normalization that `module` computes, None if it is not one we know."""
    known = _declared(module) or _kind_in_torch(module)
    if known is not None:
        return known
    found = _recognized(module)
    return None if found is None else found.kind


def formula(module: nn.Module) -> Formula | None:
    """What `module` computes in eval mode, None if it is not a normalization we know.

    That of torch's classes, and of those that declare their kind, is known without a look; where
    such a class has another formula, only the kind and the axis of it are right.
    """
    kind = _declared(module)
    if kind is None and not is_as_in_torch(module):
        return _recognized(module)
    last = kind is None and _kind_in_torch(module) in ("layer", "rms")
    axis = getattr(module, "channel_axis", -1 if last else 1)
    has: dict[str, Any] = {
        role: name for role, name in _NAMES.items() if getattr(module, name, None) is not None
    }
    return Formula(
        kind or _kind_in_torch(module) or "",
        int(axis),
        eps=float(getattr(module, "eps", None) or _default_eps(module)),
        tail=tuple(getattr(module, "then", ())),
        frozen="variance" in has and bool(getattr(module, "frozen_statistics", False)),
        **has,
    )


def eps_name(module: nn.Module) -> str | None:
    """The attribute that holds the eps of a normalization; None where it is not known to be one."""
    found = formula(module)
    if found is None:
        return None
    if hasattr(module, "eps"):
        return "eps"
    named = [
        name
        for name, value in vars(module).items()
        if isinstance(value, float) and isclose(value, found.eps, rel_tol=1e-6)
    ]
    return named[0] if len(named) == 1 else None


def has_fixed_affine(module: nn.Module) -> bool:
    """Whether its eval mode is one affine per channel, from statistics that it holds.

    That of a BatchNorm is, and that of an InstanceNorm which tracks running statistics.
    """
    kind = norm_kind(module)
    return kind in ("batch", "instance") and statistics(module, kind) in ("running", "frozen")


def statistics(module: nn.Module, kind: NormKind) -> Statistics:
    """Where the statistics come from in eval mode."""
    if getattr(module, "frozen_statistics", False):
        return "frozen"
    if _declared(module) is None and _kind_in_torch(module) is None:
        found = _recognized(module)
        if found is not None and found.fixed:
            return "frozen" if found.frozen else "running"
    elif getattr(module, "running_var", None) is not None or any(
        name.startswith("running_") for name, _ in module.named_buffers(recurse=False)
    ):
        return "running"
    return "batch" if kind == "batch" else "sample"


def fixed_statistics(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """The tensors of `module` that hold the mean and the variance it normalizes with.

    None where it takes either from its input, or has no mean.
    """
    found = formula(module)
    if found is None or found.mean is None or found.variance is None:
        return None
    return getattr(module, found.mean), getattr(module, found.variance)


def gain_of(module: nn.Module) -> Tensor:
    """The gain that `module` multiplies the normalized value by, (C,); (1,) of 1 without one."""
    found = formula(module)
    if found is None or found.gain is None:
        return torch.ones(1)
    gain: Tensor = getattr(module, found.gain)
    return gain.detach().flatten() + found.gain_offset


def anatomy(module: nn.Module) -> Anatomy:
    """What `module` computes around its normalization.

    Raises:
        Unsupported: its forward does something that cannot be kept as a chain of its children.
    """
    if isinstance(module, Mixin) and module._why_not is not None:
        raise Unsupported(module._why_not)
    shape = getattr(module, "normalized_shape", ())
    if isinstance(shape, (tuple, list)) and len(shape) > 1:
        raise Unsupported(f"normalizes over several axes at once, {tuple(shape)}")
    cls = _class_of(module)
    if "forward" in vars(module):
        raise Unsupported(f"the forward of {cls.__name__} was replaced on the instance")
    found = formula(module)
    if found is None or not _agrees(module, found):
        raise Unsupported(f"{cls.__name__}.forward does more than normalize")
    if found.why_not is not None:
        raise Unsupported(f"{cls.__name__} {found.why_not}")
    return Anatomy(found.channel_axis, found.tail)


def before_tail(module: nn.Module, tail: Iterable[str], args: tuple[Any, ...]) -> Any:
    """What `module` makes of `args` before the children `tail` take it."""
    children = dict(module._modules)
    try:
        module._modules.update({name: nn.Identity() for name in tail})
        return type(module).forward(module, *args)
    finally:
        module._modules.update(children)


# The names that torch's normalizations give to what a formula consists of.
_NAMES = {
    "gain": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "variance": "running_var",
}


def speaks_as_torch(module: nn.Module, found: Formula) -> bool:
    """Whether the tensors and the eps of `found`, which is fixed, are where torch has them."""
    named = all(getattr(found, role) in (name, None) for role, name in _NAMES.items())
    eps = getattr(module, "eps", None)
    is_torchs = isinstance(eps, float) and isclose(eps, found.eps, rel_tol=1e-8)
    return named and is_torchs and not found.gain_offset


def _agrees(module: nn.Module, found: Formula) -> bool:
    """Whether a subclass of a normalization of torch's is one, as its class and attributes say."""
    kind = _kind_in_torch(module)
    if kind is None or _declared(module) is not None:
        return True
    if kind in ("batch", "instance") and getattr(module, "running_var", None) is not None:
        return found.fixed and speaks_as_torch(module, found)
    named = found.gain in ("weight", None) and found.bias in ("bias", None)
    return found.kind == kind and not found.fixed and named


def _declared(module: nn.Module) -> NormKind | None:
    kind = getattr(type(module), "norm_kind", None)
    return None if kind is None else str(kind)


def _kind_in_torch(module: nn.Module) -> NormKind | None:
    return next((kind for cls, kind in _KINDS if isinstance(module, cls)), None)


def _recognized(module: nn.Module) -> Formula | None:
    cls = _class_of(module)
    if cls.__module__.startswith("torch."):  # a layer, a container: no normalization of torch's
        return None
    return recognized(module, cls)


def _class_of(module: nn.Module) -> type[nn.Module]:
    """The class of `module` without what freezing or a parametrization mixed in."""
    thawed = getattr(type(module), "thawed", None)
    return thawed or parametrize.type_before_parametrizations(module)


def is_foreign(module: nn.Module) -> bool:
    """Whether it is a normalization for what it computes alone, and not by its class."""
    return (_declared(module) or _kind_in_torch(module)) is None and norm_kind(module) is not None


def is_as_in_torch(module: nn.Module) -> bool:
    """Whether its forward is that of a normalization of torch's."""
    if _kind_in_torch(module) is None:
        return False
    cls = _class_of(module)
    nearest = next(each for each in cls.__mro__ if each.__module__.startswith("torch.nn"))
    return getattr(cls, "forward", None) is getattr(nearest, "forward", ...)


def _default_eps(module: nn.Module) -> float:
    # nn.RMSNorm(eps=None) uses the machine epsilon of its input (torch.nn.RMSNorm's documentation).
    return torch.finfo(torch.float32).eps if isinstance(module, nn.RMSNorm) else 0.0
