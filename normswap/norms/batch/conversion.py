"""What torch's converters to SyncBatchNorm, and back, leave as it is.

`nn.SyncBatchNorm.convert_sync_batchnorm`, timm's `convert_sync_batchnorm` and Lightning's
`sync_batchnorm=True` build a new SyncBatchNorm for whatever is a `_BatchNorm`, and register it in
the old one's place. A frozen BatchNorm would train again, in tune mode its affine would be applied
twice, and a method that is more than a BatchNorm would lose what it adds: gates, logits, domains,
the size of a ghost batch. None of them needs, or can have, the statistics of other processes.

torch asks the hooks of `register_module_module_registration_hook` about every module that is
registered, and takes the one that a hook returns. Ours returns the old one where the new one is
nothing but a conversion of it: it holds the very same tensor of running means. Anything else that
is put in its place, by hand or by `normswap.convert`, is registered as always. What is not
registered anywhere, because the model *is* the normalization, is out of reach.
"""

import warnings

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_module_registration_hook

from normswap.norms.batch.frozen import FrozenStatistics
from normswap.norms.batch.plain import BatchNorm


def _keep(parent: nn.Module, name: str, new: nn.Module | None) -> nn.Module | None:
    """The module that is registered in `parent` as `name` now, if it is to stay; else None."""
    if not isinstance(new, _BatchNorm):
        return None
    old = parent._modules.get(name)
    frozen = isinstance(old, FrozenStatistics)
    if old is None or not (frozen or _is_more(old)) or not _is_conversion(new, old):
        return None
    if not frozen:
        warnings.warn(
            f"{name!r} stays a {type(old).__name__}, whose statistics are those of one process: "
            "as a SyncBatchNorm it would compute something else",
            stacklevel=4,
        )
    return old


def _is_more(module: nn.Module) -> bool:
    """Whether it is a BatchNorm of ours that computes something else than torch's."""
    return isinstance(module, BatchNorm) and type(module) is not BatchNorm


def _is_conversion(new: nn.Module, old: nn.Module) -> bool:
    return (
        new is not old
        and (isinstance(new, nn.SyncBatchNorm) or isinstance(old, nn.SyncBatchNorm))
        and new.running_mean is getattr(old, "running_mean", None)
    )


register_module_module_registration_hook(_keep)  # type: ignore[arg-type] # it may return one
