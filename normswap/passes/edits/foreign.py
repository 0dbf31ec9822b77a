"""A batch normalization of somebody else's class becomes a BatchNorm, in place.

What reads statistics, or computes an affine from them, reads `running_mean`, `running_var`,
`weight`, `bias` and `eps`. Others' classes have other names, or an eps inside their forward.
"""

import torch
from torch import Tensor, nn

from normswap.core.errors import Unsupported
from normswap.graph.norm_modules import anatomy, formula, is_foreign, speaks_as_torch
from normswap.norms.batch.followed import FollowedBatchNorm
from normswap.norms.batch.frozen import freeze_statistics
from normswap.norms.batch.plain import BatchNorm


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
