"""From a torch module to an onnx_ir graph, by torch's exporter (torch.onnx with dynamo=True).

Added here: the dimensions of which the size is left open, what the exporter prints is kept from the
terminal, and its errors become one line.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import nn

from normswap.core.ambient import alone, loggers_silent, warnings_ignored
from normswap.core.calls import cloned
from normswap.core.compat import graph_opsets
from normswap.core.errors import NormswapError
from normswap.core.interrupts import patched
from normswap.deploy.diverge import Array, CallArguments, one_line
from normswap.deploy.lower.older import OLDEST, to_opset
from normswap.deploy.sizes import Dynamic, name_sizes, open_sizes
from normswap.graph.exporting import tracing

# torch's operators are written for this opset; one older than OLDEST torch converts down to.
_NATIVE_OPSET = 18
# Of those by which torch.onnx translates.
_LOGGERS = ("torch.onnx", "torch.export", "torch._export", "torch.fx", "onnxscript", "onnx_ir")


def translate(
    model: nn.Module,
    call: CallArguments,
    outputs: list[Array],
    opset: int | None,
    dynamic: Dynamic,
) -> torch.onnx.ONNXProgram:
    """The graph of `model` for inputs like those of `call`, for which it gives `outputs`.

    Raises:
        NormswapError: torch cannot capture the model or an operator has no ONNX form; the model's
            code, or the opset, allows no dynamic size.
    """
    if opset is not None and not graph_opsets()[0] <= opset <= graph_opsets()[1]:
        raise NormswapError(f"opset {opset} is not supported; {possible_opsets()}")
    older = opset is not None and OLDEST <= opset < _NATIVE_OPSET
    opened = open_sizes(model, call, outputs, dynamic)
    args, kwargs = cloned(opened.call)
    try:
        with tracing(), quiet(), torch.no_grad():
            program = torch.onnx.export(
                model,
                args,
                kwargs=kwargs,
                dynamo=True,
                opset_version=_NATIVE_OPSET if older else opset,
                dynamic_shapes=opened.shapes,
                verbose=False,
            )
    except Exception as error:  # torch's own, and whatever the user's forward raises in tracing
        raise NormswapError(_essence(error, dynamic)) from error
    assert program is not None  # only without dynamo
    name_sizes(program.model.graph, opened.names)
    if opset is not None and older:
        to_opset(program.model, opset)
    return program


def _essence(error: BaseException, dynamic: Dynamic) -> str:
    """One line from torch's pages: the operator, or the innermost reason."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error)
    operator = re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", text)
    if operator:
        return f"operator {operator[1]} has no ONNX form; replace it in the model by ones that have"
    if dynamic and re.search(r"Constraints violated|user-specified ranges|speciali[sz]ed", text):
        if dynamic in (True, "batch"):
            return (
                "the model's code fixes the batch size (a loop over it, or a reshape to a "
                "constant); export with dynamic=False (--static), or mend the code"
            )
        return (
            "the model's code fixes a size that is to be open (a layer for one size, or a reshape "
            "to a constant); export with dynamic=True (the batch alone), or name other axes"
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
