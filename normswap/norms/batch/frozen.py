"""BatchNorm with frozen statistics: one affine per channel, in training mode too.

Ioffe & Szegedy 2015 (arXiv 1502.03167), algorithm 2: with population statistics E and Var,

    y = gamma * (x - E) / sqrt(Var + eps) + beta.

`FollowedBatchNorm` goes on with children of its own, as the classes of some libraries do. What is
frozen stays so where torch, timm or Lightning convert the BatchNorms of a model.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from normswap.core.errors import NormswapError, warn
from normswap.core.mixins import Mixin, mixed_below, without
from normswap.norms.batch.plain import BatchNorm
from normswap.norms.calling import below_name, input_of
from normswap.norms.hooked import value_of
from normswap.norms.registry import register


class FixedStatistics(Mixin):
    """Mixed into the class of a BatchNorm: its running statistics stay fixed.

    The module stays what it was, with its class among the bases and its parameters, state-dict keys
    and hooks, but `train()` no longer reaches its own training flag: that is pinned to False, so
    torch's own forward normalizes with the running statistics and never updates them.

    Attributes:
        thawed: the class without this mixin.
        folded: the affine has moved into a weight (see `Folded`).
    """

    _prefix = "Frozen"
    thawed: type[nn.Module]
    frozen_statistics = True
    folded = False

    @property
    def training(self) -> bool:
        return False

    @training.setter
    def training(self, mode: bool) -> None:
        pass  # train(), eval() and direct assignment all end here, on this module alone

    def reset_running_stats(self) -> None:
        """Do nothing: torch's `update_bn` asks every BatchNorm for it, and these are to stay."""

    @classmethod
    def _members(cls, plain: type[nn.Module]) -> dict[str, Any]:
        return {"thawed": plain}


class Folded(FixedStatistics):
    """The same where the affine has moved into a weight (tune mode, arXiv 2305.11624).

    Attributes:
        tail: what is left to compute here: names of the children that a subclass applies after
            normalizing.
    """

    folded = True
    tail: tuple[str, ...] = ()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        assert isinstance(self, nn.Module)
        value = input_of(self, args, kwargs)
        for name in self.tail:
            value = getattr(self, name)(value)
        return value


def freeze_statistics(module: nn.Module, *, folded: bool = False, tail: Any = ()) -> None:
    """Give `module` its frozen class, in place.

    A class with a `train` or `eval` of its own is put in eval mode by that first: a split BatchNorm
    may gather the statistics of its parts there.
    """
    cls = without(getattr(type(module), "unnamed", type(module)), FixedStatistics)
    own = cls.train is not nn.Module.train or cls.eval is not nn.Module.eval
    if module.training and own:
        inside = [(each, each.training) for each in module.modules() if each is not module]
        module.eval()
        for each, training in inside:  # only the statistics freeze, not a dropout after them
            each.training = training
    with below_name(module):
        module.__class__ = mixed_below(Folded if folded else FixedStatistics, cls)
    vars(module).pop("training", None)
    vars(module).pop("tail", None)
    if tail:
        module.tail = tuple(tail)  # type: ignore[assignment]


def thaw_statistics(module: nn.Module, *, training: bool) -> None:
    """Undo `freeze_statistics`, in place."""
    with below_name(module):
        module.__class__ = without(type(module), FixedStatistics)
    vars(module).pop("tail", None)
    module.training = training


def scale_and_shift(module: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The affine of a BatchNorm with fixed statistics: y = scale * x + shift, each of shape (C,).

    Computed in `dtype`; differentiable in the module's weight and bias. A method whose eval mode is
    another affine than BatchNorm's has a method `eval_affine(dtype)` that returns it.
    """
    own = getattr(module, "eval_affine", None)
    if own is not None:
        scale, shift = own(dtype)
        return scale, shift
    variance = value_of(module, "running_var").to(dtype)
    scale = torch.rsqrt(variance + module.eps)  # type: ignore[operator]
    if module.weight is not None:
        scale = scale * value_of(module, "weight").to(dtype)
    shift = -value_of(module, "running_mean").to(dtype) * scale
    if module.bias is not None:
        shift = shift + value_of(module, "bias").to(dtype)
    return scale, shift


def check_statistics(module: nn.Module, name: str) -> None:
    """Raise unless the running statistics of `module` can be used.

    Raises:
        NormswapError: a mean or variance has no value, is not finite, or a variance is negative.
    """
    for path, statistic in module.named_buffers():
        kind, _, what = path.rpartition(".")[2].partition("_")
        if kind != "running":
            continue
        what = "variance" if what == "var" else what
        if statistic.is_meta:
            raise NormswapError(f"{name} has no numbers, it is on the meta device; load weights")
        if not torch.isfinite(statistic).all():
            raise NormswapError(
                f"the running {what} of {name} holds NaN or infinity; "
                "re-estimate its statistics from data, or exclude it"
            )
        if what == "variance" and (statistic < 0).any():
            raise NormswapError(
                f"the running variance of {name} is negative ({statistic.min():.3g}); "
                "the checkpoint is damaged, or its keys were mixed up"
            )


def _frozen_batch_norm(num_features: int, *, eps: float = 1e-5, affine: bool = True) -> nn.Module:
    module = BatchNorm(num_features, eps=eps, affine=affine)
    freeze_statistics(module)
    return module


register(
    "frozen_batch_norm",
    _frozen_batch_norm,
    keeps="exact",
    summary="BatchNorm whose running statistics no train() changes",
    source="He et al. 2017, arXiv 1703.06870, section 3.1",
    formula="gamma (x - E) / sqrt(Var + eps) + beta, E and Var fixed",
    statistics="fixed",
    cost="1 pass",
    needs_running=True,
)


class FollowedBatchNorm(BatchNorm):
    """Batch normalization, then the children named in `then`, in order.

    It takes the place of somebody else's class that applies a drop and an activation to the value
    it has normalized, where the class itself keeps its statistics in another way.
    """

    then: tuple[str, ...] = ()

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        for name in self.then:
            y = getattr(self, name)(y)
        return y


# --- what converters leave ------------------------------------------------------------------------

# `nn.SyncBatchNorm.convert_sync_batchnorm`, timm's `convert_sync_batchnorm` and Lightning's
# `sync_batchnorm=True` build a new SyncBatchNorm for whatever is a `AnyBatchNorm`, and register it
# in the old one's place. A frozen BatchNorm would train again, in tune mode its affine would be
# applied twice, and a method that is more than a BatchNorm would lose what it adds: gates, logits,
# domains, the size of a ghost batch. None of them needs, or can have, the statistics of other
# processes. timm's `freeze_batch_norm_2d` would in tune mode apply the affine twice as well.
#
# torch asks the hooks of `register_module_module_registration_hook` about every module that is
# registered, and takes the one that a hook returns. Ours returns the old one where the new one is
# nothing but a conversion of it: it holds the very same running means. Anything else that is put in
# its place, by hand or by `normswap.convert`, is registered as always. What is not registered
# anywhere, because the model *is* the normalization, is out of reach.


def _keep(parent: nn.Module, name: str, new: nn.Module | None) -> nn.Module | None:
    """The module that is registered in `parent` as `name` now, if it is to stay; else None."""
    old = parent._modules.get(name)
    if new is None or new is old or not isinstance(old, (FixedStatistics, BatchNorm)):
        return None
    assert isinstance(old, nn.Module)
    if not _same_statistics(new, old):
        return None
    synced = isinstance(new, nn.SyncBatchNorm) or isinstance(old, nn.SyncBatchNorm)
    if isinstance(old, Folded):
        if not synced:
            _say(
                f"{name!r} stays frozen in tune mode, a weight computes its affine; unfreeze first"
            )
        return old
    if synced and isinstance(old, FixedStatistics):
        return old
    if synced and type(old) is not BatchNorm:
        _say(
            f"{name!r} stays a {type(old).__name__}, whose statistics are those of one process: as "
            "a SyncBatchNorm it would compute something else"
        )
        return old
    return None


def _same_statistics(new: nn.Module, old: nn.Module) -> bool:
    """Whether both have the same running means, in the same memory, or both have none."""
    first, second = (getattr(module, "running_mean", module) for module in (new, old))
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)):
        return first is None and second is None
    alike = first.dtype == second.dtype and first.device == second.device and not first.is_meta
    return first is second or (alike and first.is_set_to(second))


def _say(words: str) -> None:
    warn(words, stacklevel=5)  # of the converter, whoever that is


register_module_module_registration_hook(_keep)  # type: ignore[arg-type] # it may return one
