"""Where an ONNX file and its model part ways: the comparison of values, and the first bad layer.

torch's exporter writes on every ONNX node the path of the module it came from
(`pkg.torch.onnx.name_scopes`). So a module's output, recorded by a forward hook, can be held
against the ONNX values computed in that module's scope, in the order of the graph.
"""

import ast
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from torch import nn

from normswap.core.calls import recorded
from normswap.core.compat import pytree
from normswap.core.errors import NormswapError, first_line
from normswap.deploy.float16_values import has_float16, with_float16_kept

# Before 1.24 ONNX Runtime follows external data out of the file's folder, by .. and links too.
_READS_ANYWHERE = tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 24)

Array = npt.NDArray[Any]
CallArguments = tuple[tuple[Any, ...], dict[str, Any]]  # what a model is called with: args, kwargs

# Two correct implementations that sum in another order differ by some roundings of the largest
# value. Measured, torch against ONNX Runtime, float32, random statistics: ResNet-50 9 eps of the
# largest output, ConvNeXt-T 13, EfficientNet-B0 9, MobileNetV3 5.
ROUNDINGS = 32


class Deviation(NamedTuple):
    """How far two values are apart, and whether that is within tolerance."""

    max_abs: float
    max_rel: float
    agrees: bool


def compare(actual: Array, expected: Array, *, rtol: float, atol: float) -> Deviation:
    """Compare two arrays of any shape.

    They agree if shape and dtype are the same, NaN and infinities are in the same places, and
    everywhere else `|actual - expected| <= floor + rtol * |expected|`. The floor is `atol *
    max(1, peak)`, and at least `ROUNDINGS * eps * peak`, with `peak` the largest finite
    `|expected|` and `eps` that of the dtype: so float16 is not held to float32's precision, nor a
    small value, which is a difference of large ones, to more digits than those have.
    Integers and booleans must be equal. `max_rel` is `max_abs / peak`; both are infinite where
    the arrays cannot be compared.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return Deviation(np.inf, np.inf, False)
    inexact = np.issubdtype(expected.dtype, np.inexact)
    wide = np.result_type(expected.dtype, np.float64)
    a, b = actual.astype(wide), expected.astype(wide)
    finite = np.isfinite(b)
    if not np.isfinite(a[finite]).all() or not np.array_equal(a[~finite], b[~finite], True):
        return Deviation(np.inf, np.inf, False)
    error, size = np.abs(a[finite] - b[finite]), np.abs(b[finite])
    max_abs, peak = float(error.max(initial=0)), float(size.max(initial=0))
    max_rel = max_abs / peak if peak else (np.inf if max_abs else 0.0)
    if not inexact:
        return Deviation(max_abs, max_rel, bool((actual == expected).all()))
    floor = max(atol * max(1.0, peak), ROUNDINGS * float(np.finfo(expected.dtype).eps) * peak)
    return Deviation(max_abs, max_rel, bool((error <= floor + rtol * size).all()))


def arrays(tree: Any) -> list[Array]:
    """The tensors nested in `tree`, in pytree order, as arrays of their own (bfloat16 widened)."""
    tensors = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    # numpy has no bfloat16, and ONNX Runtime's CPU hardly any kernel for it.
    wide = [tensor.float() if tensor.dtype is torch.bfloat16 else tensor for tensor in tensors]
    return [tensor.detach().numpy().copy() for tensor in wide]


def open_session(
    model: Path | bytes, folder: Path, *, optimized: bool = True
) -> onnxruntime.InferenceSession:
    """ONNX Runtime on the CPU, silent; `folder` is where external data lies.

    Raises:
        NormswapError: not an ONNX file, or one that the CPU provider has no kernels for.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if isinstance(model, bytes):
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, str(folder))
    source = model if isinstance(model, bytes) else str(model)
    try:
        if isinstance(model, Path) and _READS_ANYWHERE:
            onnx.checker.check_model(str(model))  # external data outside the folder among others
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        for entry in (*session.get_inputs(), *session.get_outputs()):
            _ = entry.name, entry.shape  # in a damaged file these are no text
        return session
    except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
        reason = one_line(error)
        if "NOT_IMPLEMENTED" in reason or "Type Error" in reason:
            raise NormswapError(
                f"ONNX Runtime's CPU cannot run this model ({reason}); use float32 "
                "(model.float()), or export it without validation"
            ) from error
        name = "the file" if isinstance(model, bytes) else repr(str(model))
        raise NormswapError(
            f"{name} is corrupt or not an ONNX model ({reason}); export it again"
        ) from error


def open_faithful(path: Path) -> onnxruntime.InferenceSession:
    """As `open_session`, and float16 values are rounded to float16 (`float16_values`).

    Raises:
        NormswapError: as `open_session`.
    """
    session = open_session(path, path.parent)
    proto = onnx.load(path, load_external_data=False)
    if not has_float16(proto.graph):
        return session
    del session
    return _faithful(proto, path.parent)


def _faithful(proto: onnx.ModelProto, folder: Path) -> onnxruntime.InferenceSession:
    if not has_float16(proto.graph):
        return open_session(proto.SerializeToString(), folder)
    kept = with_float16_kept(proto).SerializeToString()
    return open_session(kept, folder, optimized=False)


def one_line(error: BaseException) -> str:
    """The first line of an error, without the status that ONNX Runtime opens with."""
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : ", "", first_line(error))


def module_paths(node: onnx.NodeProto) -> list[str]:
    """The modules a node ran in, outermost first ("" is the model); none if it says none."""
    props = {prop.key: prop.value for prop in node.metadata_props}
    try:
        scopes = ast.literal_eval(props["pkg.torch.onnx.name_scopes"])
    except (KeyError, ValueError, SyntaxError):
        return []
    return [str(scope) for scope in scopes[:-1]]  # the last is the fx node


def describe(graph: onnx.GraphProto, nodes: list[onnx.NodeProto], path: str) -> str:
    """One line on the layer at `path`, which `nodes` compute."""
    initializers = {tensor.name for tensor in graph.initializer}
    read = dict.fromkeys(name for node in nodes for name in node.input)
    weights = [name for name in read if name in initializers and not name.startswith("val_")]
    reads = f", reads {', '.join(weights)}" if weights else ""
    return f"{path or 'forward'} (node {nodes[-1].name!r}, {nodes[-1].op_type}{reads})"


def failing_node(path: Path, message: str) -> str | None:
    """The layer of the node that ONNX Runtime's error message names, if it names one."""
    found = re.search(r"Name:'([^']*)'", message)
    if found is None:
        return None
    graph = onnx.load(path, load_external_data=False).graph
    for node in graph.node:
        if node.name == found[1]:
            return describe(graph, [node], ["", *module_paths(node)][-1])
    return f"node {found[1]!r}"


def first_divergence(
    path: Path,
    model: nn.Module,
    call: CallArguments,
    feed: dict[str, Array],
    *,
    rtol: float,
    atol: float,
) -> str | None:
    """The first layer, in graph order, none of whose ONNX values is the output of its module.

    A module's output is looked for among all values of its scope with its shape, since an
    optimizer may have moved or merged the last operator; a module with no such value (a
    convolution merged with the BatchNorm behind it) is judged with the module it was merged into.
    `model` is on the CPU, in eval mode. None: no layer can be blamed.
    """
    proto = onnx.load(path, load_external_data=False)
    modules = dict(model.named_modules(remove_duplicate=False))
    scopes: dict[
        nn.Module, dict[int, str]
    ] = {}  # a module's nodes, and by which path it was called
    for position, node in enumerate(proto.graph.node):
        for name in module_paths(node):
            if name in modules:
                scopes.setdefault(modules[name], {})[position] = name
    # The outputs are copied at once: the model may go on to change them in place.
    with recorded({each: each for each in model.modules()}, lambda y: [arrays(y)]) as outputs_of:
        model(*call[0], **call[1])
    values = all_values(proto, path.parent, feed)
    suspects: list[_Suspect] = []
    for module, positions in scopes.items():
        calls = outputs_of.get(module, [])
        if not calls or len(positions) % len(calls):
            continue  # the nodes of one call cannot be told from those of another
        size = len(positions) // len(calls)
        for number, outputs in enumerate(calls):
            span = list(positions)[number * size : (number + 1) * size]
            produced = [values[o] for i in span for o in proto.graph.node[i].output if o in values]
            errors = [_error(output, produced, rtol, atol) for output in outputs]
            if any(errors):
                suspects.append(_Suspect(span[-1], positions[span[-1]], span, max(errors)))
    if not suspects:
        return None
    # Rounding can exceed the tolerance at single elements inside a network that is right (behind a
    # LayerNorm over almost equal values, say): prefer layers that are off by more than that.
    clear = [suspect for suspect in suspects if suspect.error > rtol] or suspects
    # Of modules that end at the same node, the innermost is meant.
    first = min(clear, key=lambda suspect: (suspect.end, -len(suspect.name)))
    return describe(proto.graph, [proto.graph.node[i] for i in first.span], first.name)


class _Suspect(NamedTuple):
    end: int
    name: str
    span: list[int]
    error: float


def _error(output: Array, produced: list[Array], rtol: float, atol: float) -> float:
    """`max_rel` of the produced value nearest to `output`; 0 if one agrees or none is alike."""
    deviations = [
        compare(value.astype(output.dtype), output, rtol=rtol, atol=atol)
        for value in produced
        if value.shape == output.shape and value.dtype in (output.dtype, np.float16)
    ]
    if any(deviation.agrees for deviation in deviations):
        return 0.0
    return min((deviation.max_rel for deviation in deviations), default=0.0)


def all_values(proto: onnx.ModelProto, folder: Path, feed: dict[str, Array]) -> dict[str, Array]:
    """Every value the graph computes, by making each an output of `proto`, which it changes."""
    outputs = {output.name for output in proto.graph.output}
    for node in proto.graph.node:
        for name in node.output:
            if name and name not in outputs:
                proto.graph.output.append(onnx.ValueInfoProto(name=name))
    session = _faithful(proto, folder)
    names = [output.name for output in session.get_outputs()]
    results = session.run(names, feed)
    return {n: v for n, v in zip(names, results, strict=True) if isinstance(v, np.ndarray)}
