"""Where an ONNX file in float16 overflows: the layers whose values are not finite."""

from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from normswap.core.calls import cloned, recorded
from normswap.deploy.diverge import Array, CallArguments, all_values, arrays, describe, module_paths
from normswap.deploy.float16_values import has_float16

FLOAT16_MAX = float(np.finfo(np.float16).max)
REMEDY = (
    f"float16 ends at {FLOAT16_MAX:,.0f}; normswap.rescale(model, inputs, data) (normswap rescale) "
    "brings activations into that range"
)


def overflows(
    path: Path, model: nn.Module, call: CallArguments, feed: dict[str, Array]
) -> tuple[str, ...]:
    """The layers that give a float16 which is not finite, of inputs that are, in graph order.

    Each is said with the largest absolute value that its module returns in `model`, which is on
    the CPU, in eval mode. Empty for a file in which all float16 values are finite.
    """
    proto = onnx.load(path, load_external_data=False)
    if not has_float16(proto.graph):
        return ()
    nodes = list(proto.graph.node)
    values = all_values(onnx.ModelProto.FromString(proto.SerializeToString()), path.parent, feed)
    infinite = {
        name
        for name, value in values.items()
        if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all()
    }
    written_by = {name: node for node in nodes for name in node.output}
    found: dict[str, onnx.NodeProto] = {}
    for node in nodes:
        if infinite.isdisjoint(node.output) or not infinite.isdisjoint(node.input):
            continue
        if any(values[name].dtype == np.float16 for name in node.output if name in infinite):
            # The cast behind a layer in float32 is of that layer.
            of = node if module_paths(node) else written_by.get(node.input[0], node)
            found.setdefault(["", *module_paths(of)][-1], of)
    modules = dict(model.named_modules(remove_duplicate=False))
    reached = {name: module for name, module in modules.items() if name in found}
    with recorded(reached, _reach) as reaches, torch.no_grad():
        model(*cloned(call[0]), **cloned(call[1]))
    return tuple(
        describe(proto.graph, [node], name) + _told(max(reaches.get(name, [0.0])))
        for name, node in found.items()
    )


def _reach(output: object) -> list[float]:
    return [float(np.abs(each).max(initial=0)) for each in arrays(output)]


def _told(reach: float) -> str:
    return f" reaches {reach:,.0f}" if reach > FLOAT16_MAX else " overflows"
