"""What travels: the projection that takes the mean over the channels off a value.

LayerNorm(x) = RMSNorm(P x) with the projection P = I - 1 1^T / C (Jiang et al. 2023, arXiv
2305.14858, section 3), and a LayerNorm sees no difference between x and P x. So the values that
feed one may be P x instead. P treats all channels alike, and leaves nothing of what is the same for
all of them. It goes as any map of a position does (`position_map`), and

1. a LayerNorm over the same channels ends it;
2. everything else that takes a value would see that its mean is gone, so there is no centering
   then. Such is a concatenation along the channels before another LayerNorm (Swin's patch merging):
   that sees the means of its parts beside one another;
3. everything else that computes a value leaves it uncentered, for an explicit centering.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from normswap.core.errors import Unsupported
from normswap.graph.operators import is_a, operator_of
from normswap.graph.operators.rule import argument
from normswap.graph.propagation.position_map import NormCall, PositionMap


def is_layer_norm(node: fx.Node) -> bool:
    """Whether `node` is the call of a LayerNorm."""
    row = operator_of(node)
    return row is not None and row.normalizes == "layer"


@dataclass(eq=False)
class Projection(PositionMap):
    """The values that lose their mean together.

    Attributes:
        biases: for each operator that mixes positions its bias, the same for all channels, of which
            P leaves nothing.
        uncentered: values whose producer cannot be centered, and why.
    """

    biases: dict[fx.Node, fx.Node] = field(init=False, default_factory=dict)
    uncentered: dict[fx.Node, str] = field(init=False, default_factory=dict)

    def forced(self, node: fx.Node, value: fx.Node) -> Mapping[fx.Node, Tensor]:
        try:
            return super().forced(node, value)
        except Unsupported as reason:
            if node is not value:
                raise
            self.uncentered[value] = str(reason)
            return {}

    def normalized(self, norm: NormCall, value: fx.Node) -> Mapping[fx.Node, Tensor]:
        layout = self.known[value]
        over = value is norm.input and layout.shape[norm.channel_axis] == layout.numel()
        if norm.kind != "layer" or not over:
            raise self.stopped(norm.output, value)
        self.norms.add(norm.output)
        return {}

    def taken(self, node: fx.Node, value: fx.Node) -> Mapping[fx.Node, Tensor]:
        raise self.stopped(node, value)

    def added(self, node: fx.Node) -> None:
        if not is_a(node, "linear"):
            raise Unsupported("a number is added between them")
        if self.context.training:
            raise Unsupported(f"the bias of {self.name_of(node)} would not train any more")
        self.biases[node] = argument(node, "bias")

    def check_whole(self, value: fx.Node, layout: Tensor) -> None:
        """Every position has to hold every channel once, so that it has a mean."""
        channels = layout.flatten().sort().values
        if len(channels) < 2 or not torch.equal(channels, torch.arange(len(channels))):
            raise Unsupported(f"{self.name_of(value)} has not all its channels in one position")
