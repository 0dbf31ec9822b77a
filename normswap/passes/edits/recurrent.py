"""The edit that puts a normalized network in the place of one of torch's recurrent ones."""

from typing import Any, Literal

from torch import nn

from normswap.norms.registry import method_named
from normswap.passes.edits.base import BaseEdit, inherit_hooks


class ReplaceRecurrentModule(BaseEdit):
    """Replace an `nn.RNN`, `nn.LSTM` or `nn.GRU`, whose weights the new module takes over."""

    edit: Literal["replace_recurrent"] = "replace_recurrent"
    aliases: tuple[str, ...]
    method: str
    options: dict[str, Any]

    def apply(self, model: nn.Module) -> None:
        old = self.module(model)
        method = method_named(self.method)
        self.require(isinstance(old, nn.RNNBase) and method.kind == "recurrent")
        new = method.made(old, **self.options)
        for name, weight in old.named_parameters(recurse=False):
            setattr(new, name, weight)  # itself, as another network may have it too
        new.train(old.training)
        inherit_hooks(old, new)
        self.put(model, self.aliases, old, new)

    def __str__(self) -> str:
        return self.method
