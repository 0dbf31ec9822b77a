"""Which call, in which module's forward, an operator of a captured graph comes from.

A captured graph is flat; a rewrite of a forward (`normswap.passes.edits.traced_forward`) needs the
line of code. The captured operators that ran in a module itself, not in its children, are the calls
of its forward in the same order.
"""

from collections.abc import Iterable
from typing import Any

from torch import fx, nn

from normswap.core.errors import Unsupported
from normswap.graph.alignment import align
from normswap.graph.capture import Capture, capture
from normswap.graph.forward import forward_graph, forward_of
from normswap.graph.functional_norms import operator_name
from normswap.graph.index import Region
from normswap.graph.snapshot import untouched
from normswap.passes.edits.traced_forward import set_forward


class Forwards:
    """The forwards of a captured model.

    Args:
        seen: the capture, in eval mode.
        inputs: what it was made with. A forward is traced without them, which may miss what it does
            with these; so what is traced is put in its place and captured again, to be compared.
    """

    def __init__(self, seen: Capture, inputs: Any) -> None:
        self._seen, self._index, self._inputs = seen, seen.index, inputs
        self._graphs: dict[nn.Module, fx.Graph | Unsupported] = {}

    def call(self, region: Region, node: fx.Node) -> tuple[str, fx.Node]:
        """The module whose forward `node` is from, and the call in its `forward_graph`.

        Raises:
            Unsupported: the forward cannot be rewritten, or the call is not found for certain.
        """
        if region.symbolic:
            raise Unsupported("is in a forward that was not captured; give example inputs")
        module = self._index.module_of(node)
        path, name = self._index.paths[module][0], operator_name(node)
        cls = type(module).__name__
        self._seen.check_calls(path, path or cls)
        modes = region.modes.get(node)
        if modes and not isinstance(module, fx.GraphModule):
            raise Unsupported(
                f"{cls}.forward runs it in {', '.join(modes)}, which a graph would drop"
            )
        graph, found = self.graph(module), dict[fx.Node, fx.Node]()
        for run in self._index.runs[module]:
            if run.region.symbolic or not run.own:
                continue
            try:
                found |= align(self._index, run.region, run.call, graph, path, name)
            except Unsupported:
                raise Unsupported(
                    f"{cls}.forward does not show each {name} that runs in it"
                ) from None
        return path, found[node]

    def graph(self, module: nn.Module) -> fx.Graph:
        """The forward of `module`.

        Raises:
            Unsupported: it cannot be rewritten.
        """
        self.check([module])
        graph = self._graphs[module]
        if isinstance(graph, Unsupported):
            raise graph
        return graph

    def in_training(self, module: nn.Module) -> dict[fx.Node, fx.Node]:
        """Each node of `graph(module)` with that of training mode, in order.

        Left out is what neither sees an input nor leads to the output: a counter of batches.

        Raises:
            Unsupported: other operators run in training, or it cannot be traced.
        """
        graph = self.graph(module)
        if isinstance(module, fx.GraphModule):
            return {node: node for node in graph.nodes}  # it is the same in both modes
        nodes = _acting(graph)
        twins = _acting(forward_graph(module, training=True))
        if [(n.op, n.target) for n in nodes] != [(n.op, n.target) for n in twins]:
            name = type(module).__name__
            raise Unsupported(f"{name}.forward runs other code in training, which a graph cannot")
        return dict(zip(nodes, twins, strict=True))

    def check(self, modules: Iterable[nn.Module]) -> None:
        """Trace the forwards of `modules`; of many at once this takes one capture, not one each."""
        new = [module for module in dict.fromkeys(modules) if module not in self._graphs]
        for module in new:
            try:
                self._graphs[module] = forward_of(self._index, module)
            except Unsupported as reason:
                self._graphs[module] = reason
        # The graph of a GraphModule is its forward, and no trace of it.
        traced = [
            module
            for module in new
            if isinstance(self._graphs[module], fx.Graph) and not isinstance(module, fx.GraphModule)
        ]
        for module in self._different(traced):
            cls = type(module).__name__
            self._graphs[module] = Unsupported(f"{cls}.forward does more than a trace shows")

    def _different(self, modules: list[nn.Module]) -> list[nn.Module]:
        """Those whose trace is not what they compute, by halves: each look takes a capture."""
        if not modules or self._same(modules):
            return []
        if len(modules) == 1:
            return modules
        half = len(modules) // 2
        return [*self._different(modules[:half]), *self._different(modules[half:])]

    def _same(self, modules: list[nn.Module]) -> bool:
        """Whether the model is captured as before when `modules` compute what was traced."""
        with untouched(self._seen.model):
            for module in modules:
                graph = self._graphs[module]
                assert isinstance(graph, fx.Graph)
                set_forward(module, graph)
            again = capture(self._seen.model, self._inputs, anew=True)
        return _text(again) == _text(self._seen)


def _acting(graph: fx.Graph) -> list[fx.Node]:
    acting: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or not acting.isdisjoint(node.all_input_nodes):
            acting.add(node)
    for node in reversed(graph.nodes):
        if node.op == "output" or not acting.isdisjoint(node.users):
            acting.add(node)
    return [node for node in graph.nodes if node in acting]


def _text(seen: Capture) -> list[Any]:
    return [
        (node.format_node(), region.stack(node), region.modes.get(node))
        for region in seen.regions
        for node in region.graph.nodes
    ]
