"""Which sizes of the inputs a file leaves open.

The user names the axes as for torch.export (`named`), or says a word: "batch", "size" or "all"
(`word`). For a word the model itself is asked, by running it in other sizes (`trials`): torch's
exporter also leaves sizes open that the weights fix, so that it cannot be asked.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import onnx_ir as ir
from torch import nn

from normswap.core.errors import NormswapError
from normswap.deploy.diverge import Array, CallArguments
from normswap.deploy.reference_run import tensors
from normswap.deploy.sizes.named import open_by_name
from normswap.deploy.sizes.opened import OpenSizes
from normswap.deploy.sizes.word import Word, open_by_word

Dynamic = bool | Word | Mapping[str, Any] | Sequence[Any]


def open_sizes(
    model: nn.Module, call: CallArguments, outputs: list[Array], dynamic: Dynamic
) -> OpenSizes:
    """The sizes that `dynamic` leaves open; `outputs` are those of the model for `call`.

    Raises:
        NormswapError: `dynamic` names something that is not there or that the model's code fixes,
            or there is nothing that its word stands for.
    """
    if dynamic is False:
        return OpenSizes(call, None, [{} for _ in tensors(call)])
    if dynamic is True or isinstance(dynamic, str):
        return open_by_word(model, call, outputs, "batch" if dynamic is True else dynamic)
    return open_by_name(model, call, dynamic)


def name_sizes(graph: ir.Graph, names: list[dict[int, str]]) -> None:
    """Give the open sizes of the graph these names, in place of the exporter's.

    Raises:
        NormswapError: the model needs two sizes of different names to be equal.
    """
    renamed: dict[str, str] = {}
    for value, axes in zip(graph.inputs, names, strict=True):
        for axis, name in axes.items():
            size = value.shape[axis] if value.shape is not None else None
            symbol = size.value if isinstance(size, ir.SymbolicDim) else None
            if symbol is not None and renamed.setdefault(symbol, name) != name:
                raise NormswapError(
                    f"the model needs {renamed[symbol]!r} and {name!r} to be the same size; give "
                    "them one name"
                )
    for value in chain(graph.inputs, *(node.outputs for node in graph.all_nodes())):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(size, renamed) for size in value.shape])


def _renamed(size: int | ir.SymbolicDim, renamed: dict[str, str]) -> int | ir.SymbolicDim:
    """`size` in the new names; it may be an expression, such as `s0 + 1`."""
    if isinstance(size, int) or size.value is None:
        return size
    return ir.SymbolicDim(
        re.sub(r"\b[A-Za-z_]\w*\b", lambda found: renamed.get(found[0], found[0]), size.value)
    )
