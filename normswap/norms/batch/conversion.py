"""What the converters of BatchNorms in torch, timm and Lightning leave as it is.

`nn.SyncBatchNorm.convert_sync_batchnorm`, timm's `convert_sync_batchnorm` and Lightning's
`sync_batchnorm=True` build a new SyncBatchNorm for whatever is a `AnyBatchNorm`, and register it in
the old one's place. A frozen BatchNorm would train again, in tune mode its affine would be applied
twice, and a method that is more than a BatchNorm would lose what it adds: gates, logits, domains,
the size of a ghost batch. None of them needs, or can have, the statistics of other processes.
timm's `freeze_batch_norm_2d` would in tune mode apply the affine twice as well.

torch asks the hooks of `register_module_module_registration_hook` about every module that is
registered, and takes the one that a hook returns. Ours returns the old one where the new one is
nothing but a conversion of it: it holds the very same running means. Anything else that is put in
its place, by hand or by `normswap.convert`, is registered as always. What is not registered
anywhere, because the model *is* the normalization, is out of reach.
"""

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from normswap.core.errors import warn
from normswap.norms.batch.frozen import FixedStatistics, Folded
from normswap.norms.batch.plain import BatchNorm

_OURS: tuple[type, ...] = (FixedStatistics, Folded, BatchNorm)


def _keep(parent: nn.Module, name: str, new: nn.Module | None) -> nn.Module | None:
    """The module that is registered in `parent` as `name` now, if it is to stay; else None."""
    old = parent._modules.get(name)
    if old is None or new is None or new is old or not isinstance(old, _OURS):
        return None
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
    if synced and isinstance(old, BatchNorm) and type(old) is not BatchNorm:
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
