"""Which convolutions can fold in a shift that does not come in where zeros lie around their input.

`normswap.passes.edits.padded_shift` says how: they add it to their output, position by position.
"""

from collections.abc import Iterable
from dataclasses import replace
from math import prod

from torch import fx, nn

from normswap.core.errors import Unsupported
from normswap.graph.index import Index
from normswap.graph.operators import is_a
from normswap.graph.operators.moving import pads_with_zeros
from normswap.graph.operators.rule import Context, argument, shape_of
from normswap.graph.operators.weights import pads
from normswap.graph.propagation.absorbers import Absorber
from normswap.graph.propagation.owners import CALLED

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Padding:
    """The padded convolutions of a captured model.

    Args:
        context: what the rules ask of the model.
    """

    def __init__(self, index: Index, context: Context) -> None:
        self._index, self._context = index, context
        self._taken: set[str] = set()  # convolutions that add a shift

    def can_add(self, node: fx.Node) -> bool:
        """Whether `node` is a convolution that can add the shift, or pads for such ones alone."""
        if is_a(node, "pad"):
            return self._is_plain_padding(node) and all(self._is_plain(user) for user in node.users)
        return self._is_plain(node) and (pads(node) or bool(self._around(node)))

    def with_zeros(self, absorber: Absorber) -> Absorber:
        """The absorber; one that adds the shift if zeros lie around what it takes.

        Raises:
            Unsupported: other zeros lie around its input in another call.
        """
        nodes = [node for node in absorber.nodes if self.can_add(node)]
        if not nodes or absorber.side != "in" or not absorber.shift:
            return absorber
        if isinstance(absorber.shift, tuple) or absorber.offset:
            raise Unsupported("its shift meets a zero padding, and a constant before that")
        around = {self._around(node) for node in absorber.nodes}
        if len(around) > 1:
            raise Unsupported(f"different zeros lie around the inputs of {absorber.path}")
        return replace(absorber, bias=None, gives_bias=False, around=around.pop())

    def check(self, found: Iterable[Absorber], affine: int) -> None:
        """Check that adding the shift is cheaper than the affine.

        Args:
            affine: of how many numbers that is.

        Raises:
            Unsupported: it is not.
        """
        added = {
            node: each.path for each in found if each.around is not None for node in each.nodes
        }
        outputs = sum(prod(shape_of(node)) for node in added)
        if outputs > affine:
            names = ", ".join(dict.fromkeys(added.values()))
            raise Unsupported(
                f"its shift meets the zero padding of {names}, whose output has {outputs} numbers, "
                f"more than the {affine} of its affine"
            )

    def moved(self, absorbers: Iterable[Absorber]) -> None:
        """Note that `absorbers` fold in an affine."""
        self._taken |= {each.path for each in absorbers if each.around is not None}

    def check_free(self, found: Iterable[Absorber]) -> None:
        """Check that nothing changes the output of a convolution that adds a shift to it.

        Raises:
            Unsupported: something would.
        """
        found = list(found)
        taken = self._taken | {each.path for each in found if each.around is not None}
        for each in found:
            if each.side == "out" and each.path in taken:
                raise Unsupported(f"{each.path} adds the shift of another at its zero padding")

    def _around(self, node: fx.Node) -> tuple[int, ...]:
        """The zeros that an operator before the convolution pads its input with."""
        value = argument(node, "input")
        if isinstance(value, fx.Node) and is_a(value, "pad") and self._is_plain_padding(value):
            return tuple(argument(value, "pad"))
        return ()

    def _is_plain_padding(self, node: fx.Node) -> bool:
        """Whether `node` pads with zeros, as many whatever the size is."""
        zeros = pads_with_zeros(node) and argument(node, "value") in (None, 0, 0.0)
        return zeros and self._context.literal(node)

    def _is_plain(self, node: fx.Node) -> bool:
        """Whether `node` is what a module of torch's own computes, a convolution and no more."""
        if not is_a(node, "convolution"):
            return False
        conv = self._index.module_of(node)
        return (
            isinstance(conv, _CONVS)
            and conv.padding_mode == "zeros"
            and type(conv).forward in [cls.forward for cls in _CONVS]
            and type(conv)._conv_forward in [cls._conv_forward for cls in _CONVS]
            and not CALLED & vars(conv).keys()
        )
