"""Where a network hands its state on, from block to block: what a student is held to.

On the captured graph, and not by the names of classes: a value on which all that follows depends
and on nothing else of what came before, and which branches were just joined in, by a sum (He et al.
2015, arXiv 1512.03385) or a concatenation. A hook must be able to see it, so it is what the
innermost module that wrote it returns: the activation behind the sum, where it is in that module.
"""

from typing import Any

from torch import fx, nn

from normswap.graph.capture import Capture, capture
from normswap.graph.index import Region
from normswap.graph.operators import is_a


def boundaries(model: nn.Module, inputs: Any) -> list[str]:
    """The paths of the modules that return such a value, in order of execution.

    None where the model cannot be captured whole, or joins no branches.
    """
    return found_in(capture(model, inputs))


def found_in(seen: Capture) -> list[str]:
    """As `boundaries`, on a capture."""
    whole = [region for region in seen.regions if region.path == "" and not region.symbolic]
    return [path for region in whole for path in _of(region)]


def _of(region: Region) -> list[str]:
    live = _live(region)
    narrow = _narrow(live)
    returned = _returned(region, live)
    ran = [{call for call, _ in region.stack(n)} for n in live if n.op == "call_function"]
    around = (
        set.intersection(*ran) if ran else set()
    )  # a wrapper of the model is none of its blocks
    found: dict[fx.Node, str] = {}
    for node in live:
        operands = [each for each in node.all_input_nodes if each in live]
        if not is_a(node, "sum", "concatenate") or len(operands) < 2:
            continue
        for call, path in reversed(region.stack(node)):
            value = returned.get(call)
            if value in narrow and path and call not in around:
                found.setdefault(value, path)
                break
            if value is not None:
                break  # what this module returns is not all that goes on: it is inside a block
    return list(dict.fromkeys(found.values()))


def _live(region: Region) -> dict[fx.Node, None]:
    """The values that depend on the input and that the output depends on, in order."""
    needed: set[fx.Node] = set()
    for node in reversed(region.graph.nodes):
        if node.op == "output" or node in needed:
            needed.update(node.all_input_nodes)
    live: dict[fx.Node, None] = {}
    for node in region.graph.nodes:
        given = node.op == "placeholder" and node not in region.tensors
        if node in needed and (given or any(each in live for each in node.all_input_nodes)):
            live[node] = None
    return live


def _narrow(live: dict[fx.Node, None]) -> set[fx.Node]:
    """The values that are, when they were computed, the only ones still needed."""
    place = {node: index for index, node in enumerate(live)}
    end = len(place)  # of the output
    last = {
        node: max(place.get(u, end if u.op == "output" else 0) for u in node.users) for node in live
    }
    narrow: set[fx.Node] = set()
    still: set[fx.Node] = set()
    for node, index in place.items():
        still = {each for each in (*still, node) if last[each] > index}
        if still == {node}:
            narrow.add(node)
    return narrow


def _returned(region: Region, live: dict[fx.Node, None]) -> dict[str, fx.Node]:
    """For each call of a module the one value of it that is used outside, where there is one."""
    outside: dict[str, set[fx.Node]] = {}
    for node in live:
        for call, _ in region.stack(node):
            users = [user for user in node.users if user in live or user.op == "output"]
            if any(call not in {each for each, _ in region.stack(user)} for user in users):
                outside.setdefault(call, set()).add(node)
    return {call: next(iter(values)) for call, values in outside.items() if len(values) == 1}
