"""From a torch module to an onnx_ir graph, by torch's exporter (torch.onnx with dynamo=True).

Added here: the dimensions of which the size is left open, what the exporter prints is kept from the
terminal, and its errors become one line.
"""

import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any, Literal

import torch
from torch import nn

from normswap.core.ambient import alone, loggers_silent, warnings_ignored
from normswap.core.calls import cloned
from normswap.core.compat import graph_opsets, pytree
from normswap.core.errors import NormswapError
from normswap.core.interrupts import patched
from normswap.deploy.diverge import CallArguments, one_line
from normswap.deploy.reference_run import run_reference, tensors
from normswap.graph.exporting import tracing

Dynamic = bool | Literal["size"]

# torch's operators are written for this opset; an older one is reached by converting down.
_NATIVE_OPSET = 18
# The names of the dimensions behind batch and channels, by how many there are.
_POSITIONS = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}
# Of those by which torch.onnx translates.
_LOGGERS = ("torch.onnx", "torch.export", "torch._export", "torch.fx", "onnxscript", "onnx_ir")


def translate(
    model: nn.Module, call: CallArguments, opset: int | None, dynamic: Dynamic
) -> torch.onnx.ONNXProgram:
    """The graph of `model` for inputs like those of `call`.

    Raises:
        NormswapError: torch cannot capture the model or an operator has no ONNX form; the model's
            code, or the opset, allows no dynamic size.
    """
    if opset is not None and not graph_opsets()[0] <= opset <= graph_opsets()[1]:
        raise NormswapError(f"opset {opset} is not supported; {possible_opsets()}")
    args, kwargs = cloned(call)
    shapes = None
    if dynamic == "size":
        _check_other_size(model, (args, kwargs))
    if dynamic:
        (args, kwargs), shapes = _dynamic_shapes(model, (args, kwargs), dynamic)
    try:
        with tracing(), quiet(), torch.no_grad():
            program = torch.onnx.export(
                model,
                args,
                kwargs=kwargs,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=shapes,
                verbose=False,
            )
    except Exception as error:  # torch's own, and whatever the user's forward raises in tracing
        raise NormswapError(_essence(error, dynamic)) from error
    assert program is not None  # only without dynamo
    return program


def _check_other_size(model: nn.Module, call: CallArguments) -> None:
    """Refuse a model that takes its inputs in one size only, with its own words."""

    def larger(t: torch.Tensor) -> torch.Tensor:
        if t.ndim - 2 not in _POSITIONS:
            return t
        repeats = [1, 1, *[2] * (t.ndim - 2)]
        return t.repeat(repeats)

    try:
        run_reference(model, pytree.tree_map_only(torch.Tensor, larger, call))
    except NormswapError as error:
        raise NormswapError(
            "the size of the inputs cannot be left open: "
            f"{str(error).removesuffix('; give others')}; export with dynamic=True "
            "(without --dynamic-size)"
        ) from error


def _dynamic_shapes(
    model: nn.Module, call: CallArguments, dynamic: Dynamic
) -> tuple[CallArguments, dict[str, Any]]:
    """The call to trace, and by argument name which dimensions are dynamic.

    The exporter takes a size of 1 for a constant, so a lone sample is traced as two.

    Raises:
        NormswapError: the first tensor has no dimension that could be the batch.
    """
    first = tensors(call)[0]
    if first.ndim == 0 or first.shape[0] == 0:
        raise NormswapError(
            "the first input has no batch dimension to make dynamic; export with dynamic=False "
            "(--static)"
        )
    size = first.shape[0]

    def batched(leaf: Any) -> bool:
        return isinstance(leaf, torch.Tensor) and leaf.ndim > 0 and leaf.shape[0] == size

    if size == 1:
        call = pytree.tree_map(lambda t: torch.cat([t, t]) if batched(t) else t, call)
        size = 2
    args, kwargs = call
    arguments = inspect.signature(model.forward).bind(*args, **kwargs).arguments

    def open_sizes(leaf: Any) -> dict[int, str] | None:
        if not batched(leaf):
            return None
        positions = _POSITIONS.get(leaf.ndim - 2, ()) if dynamic == "size" else ()
        return {0: "batch", **dict(enumerate(positions, start=2))}

    return call, pytree.tree_map(open_sizes, arguments)


def _essence(error: BaseException, dynamic: Dynamic) -> str:
    """One line from torch's pages: the operator, or the innermost reason."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error)
    operator = re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", text)
    if operator:
        return f"operator {operator[1]} has no ONNX form; replace it in the model by ones that have"
    if dynamic and re.search(r"Constraints violated|user-specified ranges|speciali[sz]ed", text):
        if dynamic == "size":
            return (
                "the model's code fixes the size of its inputs (a layer for one size, or a "
                "reshape to a constant); export with dynamic=True (without --dynamic-size)"
            )
        return (
            "the model's code fixes the batch size (a loop over it, or a reshape to a constant); "
            "export with dynamic=False (--static), or mend the code"
        )
    if "data-dependent" in text:
        return (
            f"the model's control flow depends on tensor values ({one_line(error)}); "
            "torch.where or torch.cond can be exported"
        )
    hint = "; dynamic=False (--static) may help" if dynamic else ""
    return f"torch.onnx cannot export the model: {type(error).__name__}: {one_line(error)}{hint}"


def possible_opsets() -> str:
    return (
        f"use {_NATIVE_OPSET} to {graph_opsets()[1]} (or {graph_opsets()[0]} to "
        f"{_NATIVE_OPSET - 1} if every operator exists there)"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's prints, warnings and log records from the terminal.

    What other threads print, or log under names of their own, is shown.
    """
    streams = {name: _Silent(getattr(sys, name)) for name in ("stdout", "stderr")}
    with alone(), warnings_ignored(), patched(sys, **streams), loggers_silent(*_LOGGERS):
        yield


class _Silent:
    """A stream that leaves out what this thread writes."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._thread = stream, get_ident()

    def write(self, text: str) -> int:
        return len(text) if get_ident() == self._thread else int(self._stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
