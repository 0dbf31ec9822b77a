"""An edit for what torch computes in a hook: the older weight normalizations, and pruning.

`torch.nn.utils.weight_norm`, `spectral_norm` and `prune` put a forward pre-hook on a layer that
sets its weight from other parameters before every call.
"""

from collections.abc import Iterator
from typing import Literal

from torch import nn

from normswap.norms.hooked import bake_hook, hooked_tensors
from normswap.passes.edits.base import BaseEdit


class BakeHook(BaseEdit):
    """Replace a weight that a hook computes by its value; the hook goes."""

    edit: Literal["bake_hook"] = "bake_hook"
    tensor: str

    def apply(self, model: nn.Module) -> None:
        module = self.module(model)
        self.require(self.tensor in hooked_tensors(module))
        bake_hook(module, self.tensor)

    def __str__(self) -> str:
        return f"bake {self.path}.{self.tensor}"


def bake_hooks(model: nn.Module) -> Iterator[BakeHook]:
    """The edits that bake every such tensor of `model`."""
    for path, module in model.named_modules():
        for tensor in hooked_tensors(module):
            yield BakeHook(site=path, path=path, tensor=tensor, reason="a hook computes it")
