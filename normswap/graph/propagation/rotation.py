"""What travels: an orthogonal matrix Q on the channels of each position, y' = Q y.

An RMSNorm without a gain commutes with Q, which keeps the length of a vector (Ashkboos et al. 2024,
arXiv 2401.15024, section 3, equation 2). A LayerNorm without one does so where Q 1 = 1: Q keeps
the mean then. So the values of a stream that such normalizations alone look at may all be Q y, if
what writes them and what reads them agrees. Q goes as any map of a position does
(`position_map`), and

1. a normalization over whole blocks of channels passes it;
2. a Linear or a convolution that takes a value reads it by W' = W Q^T, which is Q along the axis of
   W that has its input channels;
3. what is the same for all channels (a bias between positions, a number) asks for Q 1 = 1;
4. attention passes it from the values to its output, which rotates each head;
5. everything else stops it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from normswap.core.errors import Unsupported
from normswap.graph.operators import is_a
from normswap.graph.operators.layout import NONE
from normswap.graph.operators.rule import argument
from normswap.graph.propagation.position_map import Mapped, NormCall, PositionMap


@dataclass(eq=False)
class Rotation(PositionMap):
    """The values that one orthogonal matrix rotates together.

    Attributes:
        readers: for each operator that takes one of the values what it reads it with.
        keeps_ones: something on the way needs a matrix with Q 1 = 1.
    """

    whole_values: ClassVar[bool] = False  # queries stay as they are beside values in one tensor

    readers: dict[fx.Node, Mapped] = field(init=False, default_factory=dict)
    keeps_ones: bool = field(init=False, default=False)
    _waiting: dict[fx.Node, fx.Node] = field(init=False, default_factory=dict)

    def propagate(self, seeds: Mapping[fx.Node, Tensor]) -> None:
        super().propagate(seeds)
        for output, value in self._waiting.items():
            raise self.stopped(output, value)

    def normalized(self, norm: NormCall, value: fx.Node) -> Mapping[fx.Node, Tensor]:
        layout = self.known[value]
        over = value in (norm.input, norm.output)
        alone = layout.shape[norm.channel_axis] == layout.numel()
        if norm.kind not in ("layer", "rms") or not (over and alone):
            raise self.stopped(norm.output, value)
        if bool((layout == NONE).any()):  # of channels side by side, say, some of which come later
            self._waiting[norm.output] = value
            return {}
        self._waiting.pop(norm.output, None)
        self.keeps_ones |= norm.kind == "layer"
        self.norms.add(norm.output)
        return {norm.input: layout, norm.output: layout}

    def taken(self, node: fx.Node, value: fx.Node) -> Mapping[fx.Node, Tensor]:
        self.readers[node] = replace(self.placed(node, value), bias=None)
        return {}

    def check_other_use(self, node: fx.Node, user: fx.Node) -> None:
        # A head that is tied to an embedding has to be one of the readers, and is if all that reads
        # the weight is found to rotate it alike (`graph.rotations`).
        pass

    def added(self, node: fx.Node) -> None:
        self.keeps_ones = True

    def unlisted(self, node: fx.Node, value: fx.Node) -> Mapping[fx.Node, Tensor]:
        if not is_a(node, "attention"):
            raise self.stopped(node, value)
        values, layout = argument(node, "value"), self.known[value]
        queries, keys = argument(node, "query"), argument(node, "key")
        if value not in (node, values) or values in (queries, keys) or layout.shape[-1] == 1:
            raise self.stopped(node, value)
        if layout.numel() != layout.shape[-1]:
            raise Unsupported(f"the heads of {self.name_of(node)} are rotated apart")
        return {node: layout, values: layout}

    def check_whole(self, value: fx.Node, layout: Tensor) -> None:
        """Every block has to hold every channel once."""
        channels = layout[layout != NONE]
        counts = torch.bincount(channels, minlength=self.size)
        if self.size < 2 or not bool((counts == counts[0]).all()):
            raise Unsupported(f"{self.name_of(value)} has not all its channels in one position")
