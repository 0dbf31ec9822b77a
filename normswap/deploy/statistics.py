"""Which nodes of an ONNX graph normalize, and so square values and divide by a root of their mean.

A float16 holds the square of nothing beyond 256, and 8 bits hold no mean square of a faint image.
"""

from collections.abc import Collection, Iterator
from itertools import islice

from onnx import GraphProto, NodeProto

from normswap.deploy.diverge import module_paths

# What leads from a mean square to the factor that normalizes.
_FACTOR = {"Add", "Clip", "Div", "Expand", "Max", "Mul", "Pow", "Reciprocal", "Sqrt", "Unsqueeze"}
_ROOT = {"Pow", "Sqrt"}
_MEAN = {"ReduceMean", "ReduceSum"}


def normalizing(graph: GraphProto, scopes: Collection[str]) -> list[NodeProto]:
    """The nodes that ran inside a module at one of the paths in `scopes`, in graph order.

    Those of a normalization that a forward writes out are among them: from the square to the
    product with the inverse of its root.
    """
    written_out = {node.name for formula in _written_out(graph) for node in formula}
    return [
        node
        for node in graph.node
        if node.name in written_out or not set(scopes).isdisjoint(module_paths(node))
    ]


def _written_out(graph: GraphProto) -> Iterator[list[NodeProto]]:
    """The nodes of each mean of squares, up to the products with what is made of its root."""
    producers = {name: node for node in graph.node for name in node.output}
    weights = {tensor.name for tensor in graph.initializer}
    for index, mean in enumerate(graph.node):
        square = producers.get(mean.input[0]) if mean.input else None
        if square is None or mean.op_type not in _MEAN or not _is_square(square):
            continue
        formula, factors = [square, mean], {mean.output[0]}
        for node in islice(graph.node, index + 1, None):
            if node.op_type in _FACTOR and not factors.isdisjoint(node.input):
                formula.append(node)
                if factors | weights >= set(node.input):
                    factors.update(node.output)
        if any(node.op_type in _ROOT for node in formula[2:]):
            yield formula


def _is_square(node: NodeProto) -> bool:
    return node.op_type == "Pow" or (node.op_type == "Mul" and node.input[0] == node.input[1])
