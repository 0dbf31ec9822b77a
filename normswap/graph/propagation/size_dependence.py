"""Which numbers of a captured graph are written in the code, and which are computed from a size.

In `y / x.shape[-1]` the captured graph has the number of the example's size. The forward, traced
without an example, shows where it comes from.
"""

from collections.abc import Callable

from torch import fx, nn
from torch.utils import _pytree as pytree

from normswap.core.errors import Unsupported
from normswap.graph.alignment import align
from normswap.graph.capture import Region
from normswap.graph.forward import forward_graph


class SizeDependence:
    """Tells of an operator whether its numbers are the same for every input.

    Args:
        region: gives the graph that a node is in.
    """

    def __init__(self, model: nn.Module, region: Callable[[fx.Node], Region]) -> None:
        self._model, self._region = model, region
        self._traces: dict[nn.Module, fx.Graph | None] = {}
        self._written: dict[tuple[int, str], dict[fx.Node, fx.Node]] = {}

    def __call__(self, node: fx.Node) -> bool:
        """Whether it is known that the numbers `node` is given are; False where no trace tells."""
        region = self._region(node)
        stack = region.stack(node)
        if region.symbolic or not stack:
            return False
        call, path = stack[-1]
        if (id(region), call) not in self._written:
            self._written[id(region), call] = self._align(region, call, path)
        written = self._written[id(region), call].get(node)
        return written is not None and _tensors(written) == _tensors(node)

    def _align(self, region: Region, call: str, path: str) -> dict[fx.Node, fx.Node]:
        module = self._model.get_submodule(path)
        try:
            if module not in self._traces:
                self._traces[module] = None
                self._traces[module] = forward_graph(module)
            trace = self._traces[module]
            return {} if trace is None else align(self._model, region, call, trace, path)
        except Unsupported:
            return {}


def _tensors(node: fx.Node) -> int:
    """How many of the operands are computed; a literal is not, nor is a list of them."""
    operands = pytree.tree_leaves(tuple(node.args[:2]))
    return sum(isinstance(operand, fx.Node) for operand in operands)
