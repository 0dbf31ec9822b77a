"""What folds a change in: an `Absorber` is the module whose tensors do, an `Absorbers` finds it."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from normswap.core.errors import Unsupported
from normswap.graph.index import Index, own_tensors
from normswap.graph.operators.rule import ChannelIndex, Factor, Folding
from normswap.graph.propagation.engine import Operators
from normswap.graph.propagation.owners import Owners
from normswap.graph.propagation.scale_shift import Multiple


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


class Absorbers:
    """The modules of a captured model that can fold in a change.

    Attributes:
        given: those that have been given a bias, by their path.
    """

    def __init__(self, index: Index, owners: Owners, operators: Operators) -> None:
        self._index, self._owners, self._calls = index, owners, operators.calls
        self.given: set[str] = set()

    def of(self, each: Folding, shifts: tuple[Factor, Factor], inverse: bool) -> Absorber:
        """The module that folds in a change where `each` says so.

        Args:
            shifts: how often the shift comes in, and the offset.
            inverse: it takes the affine back.

        Raises:
            Unsupported: the tensors are not the parameters of one module.
        """
        shift, offset = map(multiple, shifts)
        how: dict[str, Any] = {"shift": shift, "offset": offset, "inverse": inverse}
        where = each.channel_index
        if each.node in self._calls:
            name = self._calls[each.node][0].name
            how |= {"normalization": True}
            return Absorber(name, "weight", "bias", False, each.side, where, where, **how)
        if each.weight is each.value:
            region = self._index.region_of[each.node]
            path, name = self._owners.of(region, region.module_path(each.node), each.weight)
            return Absorber(path, name, None, False, "value", where, **how)
        path, weight, bias, gives = self._owners.weight_and_bias(each)
        gives = gives and path not in self.given
        if each.bias_alone:
            return Absorber(path, weight, None, gives, "value", where, where, **how)
        if not shift and not offset and (gives or each.side == "in"):
            bias, gives = None, False
        return Absorber(path, weight, bias, gives, each.side, where, each.bias_index, **how)

    def has_bias(self, each: Folding, *, new: bool = True) -> bool:
        """Whether a shift can be added where `each` folds in.

        Args:
            new: to a bias that is made for it, too.
        """
        if each.node in self._calls or each.weight is each.value:
            return True
        _, _, bias, gives = self._owners.weight_and_bias(each)
        return bias is not None and (new or not gives)

    def check_reads(self, found: Mapping[Absorber, Set[fx.Node]]) -> None:
        """Check that only these operators read what the absorbers change.

        Args:
            found: the operators of each.

        Raises:
            Unsupported: others do, or a tensor would change in two ways.
        """
        uses: dict[tuple[str, str], int] = {}
        for absorber in found:
            key = absorber.path, f"{absorber.weight} {absorber.side}"
            uses[key] = uses.get(key, 0) + 1
            if uses[key] > 1:
                raise Unsupported(f"{absorber.path} would have to fold it in two ways")
        for absorber, nodes in found.items():
            names = [name for name in (absorber.weight, absorber.bias) if name is not None]
            if absorber.normalization:
                # All of its tensors change, and without an affine only its statistics tell of its
                # calls.
                norm = self._index.modules[absorber.path]
                names = [name for name, _ in own_tensors(norm)]
                calls = self._calls
                nodes = {n for node in nodes for n in calls[node][1].nodes}
            elif absorber.side == "value":  # the propagation has followed whoever reads it
                nodes = {user for node in nodes for user in node.users}
            self._owners.check_reads(absorber.path, names, nodes)


def multiple(factor: Factor) -> Multiple:
    """One number where it is the same for every channel."""
    if not isinstance(factor, Tensor):
        return factor
    return float(factor[0]) if bool((factor == factor[0]).all()) else tuple(factor.tolist())
