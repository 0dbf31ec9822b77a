"""Give convolutions that are called as functions a module, so that their branches can be merged.

In a program that torch.export made every convolution is a call, and its weight lies in a bare
module. One that is a branch of a sum gets a module there, with the very same tensors.
"""

from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from normswap.core.errors import Unsupported
from normswap.graph.branches.linear import Linear
from normswap.graph.branches.sums import Sum
from normswap.graph.capture import Capture, Region, join
from normswap.graph.functional import argument
from normswap.graph.operators import is_a
from normswap.passes.edits.conv import ModularizeConv, conv_of
from normswap.passes.forwards import Forwards


def modularize_convs(
    model: nn.Module, seen: Capture, inputs: Any, sums: Sequence[Sum]
) -> list[ModularizeConv]:
    """An edit for each weight of a convolution that is a branch of a sum.

    Args:
        seen: a capture of `model` in eval mode with `inputs`.
        sums: those in it.
    """
    forwards = Forwards(model, seen, inputs)
    edits: dict[str, ModularizeConv] = {}
    for found in sums:
        for leaf in found.value.leaves():
            if _is_called(model, found.region, leaf):
                try:
                    edit = _edit(model, forwards, found.region, leaf.node)
                except Unsupported:  # the sum is left, for the reason that it is a call
                    continue
                edits.setdefault(edit.site, edit)
    return list(edits.values())


def _is_called(model: nn.Module, region: Region, leaf: Linear) -> bool:
    """Whether it is a convolution in the graph of a GraphModule."""
    where = model.get_submodule(region.module_path(leaf.node))
    return is_a(leaf.node, "convolution") and isinstance(where, fx.GraphModule)


def _edit(model: nn.Module, forwards: Forwards, region: Region, node: fx.Node) -> ModularizeConv:
    path, call = forwards.call(region, node)
    module, weight = model.get_submodule(path), argument(call, "weight")
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        raise Unsupported("computes its weight in forward")
    holder = str(weight.target).rpartition(".")[0]
    reads = [n for n in call.graph.find_nodes(op="get_attr") if _is_in(holder, str(n.target))]
    calls = sorted({user for read in reads for user in read.users})
    if any(each.target is not call.target for each in calls):
        raise Unsupported("its weight is used elsewhere too")
    conv_of(module, calls, holder)  # it raises what stands against it
    return ModularizeConv(
        site=join(path, holder),
        path=path,
        reason="is a branch of a sum",
        nodes=tuple(each.name for each in calls),
        holder=holder,
    )


def _is_in(holder: str, target: str) -> bool:
    return target.rpartition(".")[0] == holder
