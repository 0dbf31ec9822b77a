"""What is traced, and which of its axes are open, as torch's exporter takes it."""

import inspect
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.export import Dim

from normswap.core.compat import pytree
from normswap.deploy.diverge import CallArguments

# How to say it.
NAMED = 'name axes, as in dynamic={"x": {0: "batch", 1: "length"}} (--dynamic x:0=batch,1=length)'


class OpenSizes(NamedTuple):
    """What is traced, and what is open in it.

    Attributes:
        call: the inputs; an open axis has a size of 2 or more, since the exporter takes a size of 1
            for a constant.
        shapes: `dynamic_shapes` of torch.onnx.export.
        names: for each tensor the names of its open axes.
    """

    call: CallArguments
    shapes: dict[str, Any] | None
    names: list[dict[int, str]]


def arguments(model: nn.Module, call: CallArguments) -> dict[str, Any]:
    """The arguments of forward by their names."""
    return dict(inspect.signature(model.forward).bind(*call[0], **call[1]).arguments)


def dynamic_shapes(
    model: nn.Module, call: CallArguments, axes: list[dict[int, Any]]
) -> dict[str, Any]:
    """The open axes of each tensor, in the structure of the arguments."""
    waiting = iter(axes)

    def next_axes(leaf: Any) -> dict[int, Any] | None:
        if not isinstance(leaf, torch.Tensor):
            return None
        each = next(waiting)
        return {axis: Dim.DYNAMIC if isinstance(d, str) else d for axis, d in each.items()} or None

    shapes: dict[str, Any] = pytree.tree_map(next_axes, arguments(model, call))
    return shapes
