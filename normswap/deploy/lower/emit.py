"""What the rules share: reading constants and sizes, and putting nodes in the place of others."""

from collections.abc import Sequence
from math import prod

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.convenience import get_const_tensor, replace_nodes_and_values

Array = npt.NDArray[np.float32]
MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators


class NodeRule(ir.passes.InPlacePass):
    """A rule that looks at one node after the other."""

    def rewrite(self, model: ir.Model, node: ir.Node) -> bool:
        """Put something in the place of `node`; whether that was done."""
        raise NotImplementedError

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = [self.rewrite(model, node) for node in list(model.graph)]
        return ir.passes.PassResult(model, any(modified))


class Emitter:
    """Makes the nodes that will compute the value `old`; `rule` is part of their names."""

    def __init__(self, model: ir.Model, old: ir.Value, rule: str) -> None:
        self._model, self._old, self._prefix = model, old, f"{old.name}_{rule}"
        self._tape = ir.tape.Tape()
        node = old.producer()
        assert node is not None
        self._last = node
        self._scope = dict(node.metadata_props)

    def op(
        self, kind: str, *inputs: ir.Value, domain: str = "", **attributes: int | float | list[int]
    ) -> ir.Value:
        """A node of operator type `kind`; its output."""
        if domain:
            self._model.graph.opset_imports.setdefault(domain, 1)
        name = f"{self._prefix}_{kind}_{len(self._tape.nodes)}"
        output = self._tape.op(
            kind, inputs, attributes, domain=domain, name=name, metadata_props=dict(self._scope)
        )
        output.name = name
        return output

    def constant(self, values: npt.ArrayLike, dtype: npt.DTypeLike = np.float32) -> ir.Value:
        """An initializer with `values`."""
        name = f"{self._prefix}_constant_{len(self._tape.initializers)}"
        tensor = ir.tensor(np.asarray(values, dtype), name=name)
        return self._tape.initializer(tensor, name)

    def shape(self, *sizes: int) -> ir.Value:
        """The second input of a Reshape, or the axes of a reduction."""
        return self.constant(sizes, np.int64)

    def replace(self, new: ir.Value) -> None:
        """Let `new` take the name and the users of the old value, whose node goes.

        The node may stand in the body of a loop, which reads constants of the whole.
        """
        for value in self._tape.initializers:
            self._model.graph.register_initializer(value)
        graph, nodes = self._last.graph, list(self._tape.nodes)
        assert graph is not None
        replace_nodes_and_values(graph, self._last, [self._last], nodes, [self._old], [new])


def constant_of(value: ir.Value | None) -> Array | None:
    """The elements of a float32 constant, or None."""
    tensor = None if value is None else get_const_tensor(value)
    if tensor is None or tensor.dtype != ir.DataType.FLOAT:
        return None
    found: Array = tensor.numpy()
    return found


def producer(value: ir.Value | None, kind: str) -> ir.Node | None:
    """The node that computes `value`, if it is of this type, and nothing else reads its output."""
    node = value.producer() if value is not None else None
    if node is None or node.domain != "" or node.op_type != kind or len(node.outputs) != 1:
        return None
    return node


def only_use(value: ir.Value) -> bool:
    """Whether one node reads `value` and the graph does not return it."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def sizes(value: ir.Value) -> list[int | None] | None:
    """The sizes of a float32 value, None for one that is dynamic."""
    if value.shape is None or value.dtype != ir.DataType.FLOAT:
        return None
    return [size if isinstance(size, int) else None for size in value.shape]


def known(dimensions: Sequence[int | None]) -> int | None:
    """The product of sizes, if all are known."""
    fixed = [size for size in dimensions if size is not None]
    return prod(fixed) if len(fixed) == len(dimensions) else None


def per_channel(values: Array | None, rank: int, channels: int) -> Array | None:
    """`values`, broadcast against (N, C, ...) of this rank, as (C,); None if it is not."""
    if values is None or values.ndim > rank:
        return None
    shape = (1,) * (rank - values.ndim) + values.shape
    if prod(shape) == 1:
        return np.full(channels, values.reshape(()), np.float32)
    if shape != (1, channels, *(1,) * (rank - 2)):
        return None
    return values.reshape(channels)


def scaled_and_shifted(node: ir.Node) -> tuple[ir.Value, Array, Array] | None:
    """x, gamma and beta, where `node` adds beta to x gamma, which nothing else reads."""
    if node.op_type != "Add" or node.domain != "":
        return None
    shifted = _with_constant(node)
    scaled = _with_constant(producer(shifted[0], "Mul")) if shifted else None
    if shifted is None or scaled is None or not only_use(shifted[0]):
        return None
    return *scaled, shifted[1]


def _with_constant(node: ir.Node | None) -> tuple[ir.Value, Array] | None:
    """The input and the constant operand, in whatever order, of a Mul or an Add."""
    if node is None:
        return None
    first, second = node.inputs
    for value, other in ((first, second), (second, first)):
        constant = constant_of(other)
        if value is not None and constant is not None and get_const_tensor(value) is None:
            return value, constant
    return None
