"""An edit for torch's older weight normalizations, which compute a weight in a hook.

`torch.nn.utils.weight_norm` and `torch.nn.utils.spectral_norm` put a forward pre-hook on a layer
that sets its weight from other parameters before every call. Their successors are parametrizations.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn
from torch.nn.utils import remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from normswap.passes.edits.base import BaseEdit


class BakeHook(BaseEdit):
    """Replace a weight that a hook computes by its value; the hook goes."""

    edit: Literal["bake_hook"] = "bake_hook"
    tensor: str

    def apply(self, model: nn.Module) -> None:
        module = self.module(model)
        self.require(self.tensor in hooked_tensors(module))
        hook = hooked_tensors(module)[self.tensor]
        own = {name: p for name, p in module._parameters.items() if p is not None}
        remove = remove_weight_norm if isinstance(hook, WeightNorm) else remove_spectral_norm
        with torch.no_grad():
            remove(module, self.tensor)
        trained = any(p.requires_grad for name, p in own.items() if name not in module._parameters)
        module._parameters[self.tensor].requires_grad_(trained)  # type: ignore[union-attr]

    def __str__(self) -> str:
        return f"bake {self.path}.{self.tensor}"


def hooked_tensors(module: nn.Module) -> dict[str, WeightNorm | SpectralNorm]:
    """The tensors of `module` that a hook of weight or spectral norm computes."""
    hooks = module._forward_pre_hooks.values()
    return {hook.name: hook for hook in hooks if isinstance(hook, (WeightNorm, SpectralNorm))}


def bake_hooks(model: nn.Module) -> Iterator[BakeHook]:
    """The edits that bake every such tensor of `model`."""
    for path, module in model.named_modules():
        for tensor in hooked_tensors(module):
            yield BakeHook(site=path, path=path, tensor=tensor, reason="a hook computes it")
