"""Which node of a module's traced forward is which operator of the captured graph.

Both come from the same code: the trace has a node for each line of the module's own arithmetic and
for each child it calls, the captured graph the operators that these ran. In order of execution the
two are the same list, or something between them is not understood and nothing is said.
"""

import builtins
from collections.abc import Iterator

from torch import fx, nn

from normswap.core.errors import Unsupported
from normswap.graph.index import Index, Region
from normswap.graph.operators.operator import ARITHMETIC, is_a, name_of, operator_of

Event = tuple[str | nn.Module, fx.Node]  # arithmetic, padding, or a child that is called


def align(
    index: Index,
    region: Region,
    call: str,
    traced: fx.Graph,
    path: str,
    name: str | None = None,
) -> dict[fx.Node, fx.Node]:
    """The node of `traced` for each operator of the captured graph that it stands for.

    Args:
        call: one call, in `region`, of the module at `path`.
        traced: the forward of that module, with calls of children as nodes.
        name: of the operators to look for; by default arithmetic and children.

    Returns:
        For each operator of the module's own, and for every operator that ran in a child, the node.

    Raises:
        Unsupported: the two do not show the same calls and arithmetic in the same order.
    """
    ran: list[tuple[str | nn.Module, list[fx.Node]]] = []
    inside: dict[str, list[fx.Node]] = {}
    for node in region.ran.get(call, ()):
        stack = region.stack(node)
        depth = next(i for i, (each, _) in enumerate(stack) if each == call)
        if name is not None:
            if depth + 1 == len(stack) and _is_called(node, name):
                ran.append((name, [node]))
        elif depth + 1 < len(stack):
            child_call, child = stack[depth + 1]
            if child_call not in inside:
                inside[child_call] = []
                ran.append((index.modules[child], inside[child_call]))
            inside[child_call].append(node)
        elif (arithmetic := _arithmetic(node)) is not None:
            ran.append((arithmetic, [node]))
    visible = {what for what, _ in ran if isinstance(what, nn.Module)}
    written: list[Event] = (
        [(name, node) for node in traced.nodes if _is_called(node, name)]
        if name is not None
        else [
            (what, node)
            for what, node in _written(index.modules[path], traced)
            if isinstance(what, str) or what in visible
        ]
    )
    if [what for what, _ in ran] != [what for what, _ in written]:
        raise Unsupported(f"the forward of {path or 'the model'} could not be followed")
    return {
        node: traced_node
        for (_, nodes), (_, traced_node) in zip(ran, written, strict=True)
        for node in nodes
    }


def _written(module: nn.Module, traced: fx.Graph) -> Iterator[Event]:
    numbers: set[fx.Node] = set()
    for node in traced.nodes:
        if node.op == "call_module":
            yield module.get_submodule(str(node.target)), node
        elif node.op in ("call_function", "call_method"):
            if is_number(node, numbers):
                numbers.add(node)
            elif (name := _arithmetic(node)) is not None:
                yield name, node


def _is_called(node: fx.Node, name: str) -> bool:
    """Whether `node` is a call of the operator, or of the function, of that name."""
    return node.op == "call_function" and name_of(node.target) == name


def _arithmetic(node: fx.Node) -> str | None:
    """The name of an operator that a forward may write in several ways."""
    row = operator_of(node)
    return row.name if row is not None and row.kind in ARITHMETIC else None


def is_number(node: fx.Node, numbers: set[fx.Node]) -> bool:
    """Whether `node` is a size, or is computed from sizes: no operator on tensors."""
    if node.target is builtins.getattr:
        return node.args[1] in ("shape", "ndim")
    if is_a(node, "look"):
        return True
    sources = node.all_input_nodes
    return bool(sources) and all(source in numbers for source in sources)
