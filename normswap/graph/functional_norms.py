"""Normalizations that are called as functions: what a call computes, and what it could be called.

A bare `F.batch_norm` in a forward, and every normalization of an exported program, has no module.
The same operator comes in several forms: torch's function in a traced forward, ATen's in a captured
graph, and what `ExportedProgram.run_decompositions` makes of that.
"""

from collections import Counter
from collections.abc import Container
from typing import Any

import torch
from torch import fx, nn

from normswap.core.compat import OpOverload
from normswap.graph.capture import Capture
from normswap.graph.index import Index, Region, join
from normswap.graph.norm_modules import NormKind, Statistics
from normswap.graph.operators.operator import name_of, operator_of
from normswap.graph.operators.rule import argument

aten = torch.ops.aten

# What the torch.nn.Module that holds the tensors of one batch norm may have, and no more.
_OF_BATCH_NORM = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


def functional_kind(node: fx.Node) -> NormKind | None:
    """The kind of normalization that `node` computes as a function of its own."""
    if node.op != "call_function":
        return None
    row = operator_of(node)
    return None if row is None else row.normalizes


def operator_name(node: fx.Node) -> str:
    """What an operator is called, whichever way: "conv2d" for aten.conv2d.default and F.conv2d."""
    return name_of(node.target)


def returns_several(node: fx.Node) -> bool:
    """Whether the operator of `node` returns a tuple, whose items are nodes of their own."""
    return isinstance(node.target, OpOverload) and len(node.target._schema.returns) > 1


def functional_norms(
    seen: Capture, inside: Container[fx.Node]
) -> dict[str, list[tuple[Region, fx.Node]]]:
    """The normalizations of a capture that are none of the nodes `inside` modules, by name.

    The name is the path at which a module that computes it can be: that of a bare module that holds
    the tensors, or below the module whose forward has the call, with a number where it has several.
    Two runs of one call have one name, and giving some calls a module leaves the others theirs.
    """
    found: dict[str, list[tuple[Region, fx.Node]]] = {}
    for region in seen.regions:
        numbers: Counter[tuple[str, str]] = Counter()
        for node in region.graph.nodes:
            kind = functional_kind(node)
            if kind is None:
                continue
            stack = [("", ""), *region.stack(node)]
            run, path = stack[-1]
            if node in inside:  # in the run of the module that calls this one
                numbers[stack[-2][0], path.rpartition(".")[2].rstrip("_0123456789")] += 1
                continue
            name = f"{kind}_norm"
            number = numbers[run, name]
            numbers[run, name] += 1
            free = _free_name(seen.index, path, f"{name}_{number}" if number else name)
            found.setdefault(_holder(seen.index, region, node) or free, []).append((region, node))
    return found


def _free_name(index: Index, path: str, name: str) -> str:
    while hasattr(index.modules[path], name):
        name += "_"
    return join(path, name)


def _holder(index: Index, region: Region, node: fx.Node) -> str | None:
    """The bare module that holds the tensors of the functional batch norm `node`, if one does.

    They are all it holds, and nothing but this call, or more of the very same, reads them.
    """
    if functional_kind(node) != "batch":
        return None
    mean, where = argument(node, "running_mean"), region.module_path(node)
    owner = region.tensors.get(mean, "").rpartition(".")[0]
    if owner == where or not f"{owner}.".startswith(f"{where}." if where else ""):
        return None
    for role in ("weight", "bias", "running_mean", "running_var"):
        value = argument(node, role)
        if value is not None and region.tensors.get(value) != f"{owner}.{role}":
            return None
    module = index.modules[owner]
    tensors = {**module._parameters, **module._buffers}
    if type(module) is not nn.Module or module._modules or not tensors.keys() <= _OF_BATCH_NORM:
        return None
    readers = [
        user
        for each, name in region.tensors.items()
        if name.rpartition(".")[0] == owner
        for user in each.users
    ]
    same = (reader.target is node.target and reader.args[1:] == node.args[1:] for reader in readers)
    return owner if all(same) else None


def running_statistics(node: fx.Node) -> set[Any]:
    """The running mean and variance that a functional batch or instance norm is given."""
    return {argument(node, "running_mean"), argument(node, "running_var")} - {None}


def statistics_of_call(node: fx.Node) -> Statistics:
    """Where a functional batch norm takes its statistics from."""
    target: Any = node.target
    formals = getattr(getattr(target, "_schema", None), "arguments", None)
    never = formals is not None and all(each.name != "training" for each in formals)
    of_batch = not never and argument(node, "training")
    return "batch" if of_batch or not running_statistics(node) else "running"
