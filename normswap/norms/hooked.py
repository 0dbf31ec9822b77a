"""Tensors that a forward pre-hook of torch computes from others, before every call of a module.

`torch.nn.utils.weight_norm` and `spectral_norm`, whose successors are parametrizations, and
`torch.nn.utils.prune`: `weight = weight_orig * weight_mask`. In between the calls the module holds
what the last one left, which may be of the parameters of the step before.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

Hook = WeightNorm | SpectralNorm | BasePruningMethod


def hooked_tensors(module: nn.Module) -> dict[str, Hook]:
    """The tensors of `module` that a hook of these computes, by name."""
    found: dict[str, Hook] = {}
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            found[hook._tensor_name] = hook
        elif isinstance(hook, (WeightNorm, SpectralNorm)):
            found[hook.name] = hook
    return found


def value_of(module: nn.Module, name: str) -> Tensor:
    """The tensor `name` of `module` as its next call, in eval mode, will compute it."""
    hook = hooked_tensors(module).get(name)
    if hook is None:
        value = getattr(module, name)
    elif isinstance(hook, BasePruningMethod):
        value = hook.apply_mask(module)  # type: ignore[no-untyped-call]
    elif isinstance(hook, WeightNorm):
        value = hook.compute_weight(module)
    else:
        value = hook.compute_weight(module, do_power_iteration=False)
    assert isinstance(value, Tensor)
    return value


def bake_hook(module: nn.Module, name: str) -> None:
    """Make the tensor `name` of `module` a Parameter with its present value; its hook goes.

    torch's own functions do it, but `prune.remove` writes into `weight_orig`, which another module
    may share.
    """
    hook = hooked_tensors(module)[name]
    before = dict(module._parameters)
    if isinstance(hook, BasePruningMethod):
        value = value_of(module, name).detach().clone()
        for number, each in list(module._forward_pre_hooks.items()):
            if each is hook:
                del module._forward_pre_hooks[number]
        for kept in (module._parameters, module._buffers, vars(module)):
            for key in (name, f"{name}_orig", f"{name}_mask"):
                kept.pop(key, None)
        module.register_parameter(name, nn.Parameter(value))
    else:
        with torch.no_grad():
            if isinstance(hook, WeightNorm):
                nn.utils.remove_weight_norm(module, name)
            else:
                nn.utils.remove_spectral_norm(module, name)
    gone = [p for n, p in before.items() if n not in module._parameters and p is not None]
    module._parameters[name].requires_grad_(any(p.requires_grad for p in gone))  # type: ignore[union-attr]
