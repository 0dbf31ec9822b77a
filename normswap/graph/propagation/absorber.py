"""What folds in an affine."""

from dataclasses import dataclass, field

from torch import fx

from normswap.graph.operators.rule import ChannelIndex

Multiple = float | tuple[float, ...]


@dataclass(frozen=True)
class Absorber:
    """A module whose weight and bias fold in an affine y = s x + t.

    Attributes:
        path: the module.
        weight: the name of its weight, or of a constant that is itself one of the values.
        bias: the name of its bias; None where nothing is added to one.
        gives_bias: the bias does not exist yet.
        side: "out": W' = s W, b' = s b + m t; "in": W' = W s, b' = b + m W t;
            "value": c' = s c + m t.
        channel_index: where the channels lie in the weight.
        bias_index: and in the bias.
        shift: m, how often the shift comes in, or how often that of each channel does.
        offset: n; n (s - 1) comes in as well.
        inverse: it folds in the inverse, x = (y - m t) / s.
        normalization: the module is another BatchNorm.
        around: None, or the module is a convolution of what zeros lie around, where the shift does
            not come in, and adds it to its output position by position: how many zeros an operator
            before it pads with, as `F.pad` takes it.
        nodes: the operators.
    """

    path: str
    weight: str
    bias: str | None
    gives_bias: bool
    side: str
    channel_index: ChannelIndex
    bias_index: ChannelIndex | None = None
    shift: Multiple = 1.0
    offset: Multiple = 0.0
    inverse: bool = False
    normalization: bool = False
    around: tuple[int, ...] | None = None
    nodes: tuple[fx.Node, ...] = field(default=(), compare=False, repr=False)
