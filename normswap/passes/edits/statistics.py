"""Edits that fix the statistics of a BatchNorm, and let them move again."""

from typing import Literal

from torch import nn

from normswap.graph.norm_modules import norm_kind
from normswap.norms.batch.frozen import FrozenStatistics, freeze_statistics, thaw_statistics
from normswap.passes.edits.base import BaseEdit


class FreezeStatistics(BaseEdit):
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


class ThawStatistics(BaseEdit):
    """Let a frozen BatchNorm train again."""

    edit: Literal["thaw"] = "thaw"

    def apply(self, model: nn.Module) -> None:
        self.require(isinstance(self.module(model), FrozenStatistics))
        thaw_statistics(self.module(model), training=self.training(model))

    def __str__(self) -> str:
        return "thaw"
