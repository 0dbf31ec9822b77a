"""Write a model as an ONNX file, whole or not at all, and prove that it computes the same.

The exporter is torch's (torch.onnx with dynamo=True). Added here: parametrizations are baked, the
batch dimension is dynamic, large weights lie beside the file, the recipe travels in its metadata,
what the exporter prints is kept from the terminal, and its errors become one line.
"""

import contextlib
import inspect
import io
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from pydantic import BaseModel, ConfigDict
from torch import nn
from torch.onnx import _constants
from torch.utils import _pytree

import normswap
from normswap.atomic import replacing
from normswap.deploy.diverge import Call, one_line
from normswap.deploy.reference import bind, reference_copy, run_reference, tensors
from normswap.deploy.validate import ValidationReport
from normswap.deploy.validate import validate as validate_file
from normswap.errors import NormswapError

# A protobuf ends at 2 GiB; what the graph itself needs is left room for.
EXTERNAL_DATA_BYTES = 2_000_000_000

# torch's operators are written for this opset; an older one is reached by converting down.
_NATIVE_OPSET = 18


class ExportReport(BaseModel):
    """What `export` wrote.

    `bytes` counts external data too; `inputs` and `outputs` map names to shapes, a dynamic size by
    its name; `operators` counts operator types; `passed`: no check that was asked for has failed.
    """

    model_config = ConfigDict(frozen=True)

    path: Path
    opset: int
    bytes: int
    dynamic: bool
    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]
    operators: dict[str, int]
    passed: bool
    validation: ValidationReport | None

    def __str__(self) -> str:
        def shown(values: dict[str, list[int | str]]) -> str:
            return ", ".join(f"{name} {'x'.join(map(str, s))}" for name, s in values.items())

        lines = [
            f"{self.path}: opset {self.opset}, {self.bytes:,} bytes",
            f"  inputs {shown(self.inputs)}; outputs {shown(self.outputs)}",
            "  " + ", ".join(f"{name} {count}" for name, count in self.operators.items()),
        ]
        return "\n".join(lines + ([str(self.validation)] if self.validation else []))


def export(
    model: nn.Module,
    inputs: Any,
    path: str | Path,
    *,
    opset: int | None = None,
    dynamic: bool = True,
    validate: bool = True,
) -> ExportReport:
    """Export `model` in eval mode, its parametrizations baked; `model` itself is not touched.

    A file that fails validation is written all the same, and the report's `passed` is False. On
    any error, or when interrupted, the previous file at `path` stays as it was.

    Args:
        inputs: A tensor, a tuple of positional or a dict of keyword inputs, tensors nested in
            them or not.
        path: The file; weights above 2 GB go to `<path>.data` beside it.
        opset: None for torch's default.
        dynamic: Dimension 0 of every tensor that has as many samples as the first one may be of
            any size in the file.
        validate: Run `normswap.validate` on the file with `inputs`.

    Raises:
        NormswapError: inputs that the model rejects, a model that torch cannot capture or that has
            an operator without ONNX form, a batch size fixed by the model's code (with `dynamic`),
            an impossible opset, an unwritable folder, a file that ONNX Runtime cannot run.
    """
    from normswap.passes.verbs import bake  # passes are not needed to validate a file

    if opset is not None and not _constants.ONNX_MIN_OPSET <= opset <= _constants.ONNX_MAX_OPSET:
        raise NormswapError(f"there is no way to opset {opset}; {_possible_opsets()}")
    path = Path(path)
    if path.is_dir():
        raise NormswapError(f"{str(path)!r} is a folder; name a file in it, such as model.onnx")
    with torch.random.fork_rng(devices=[]):
        traced = bake(reference_copy(model), inplace=True)
        call = bind(traced, inputs)
        run_reference(traced, call)  # so that the model's own complaint is heard, not the tracer's
        program = _translate(traced, call, opset, dynamic)
    graph = program.model
    written = graph.opset_imports[""]
    if opset is not None and written != opset:
        raise NormswapError(
            f"this model has operators without a form in opset {opset}; {_possible_opsets()}"
        )
    for node in graph.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # paths of the user's machine
    graph.metadata_props["normswap.version"] = normswap.__version__
    graph.metadata_props["torch.version"] = str(torch.__version__)
    recipe = getattr(model, "_normswap_recipe", None)
    if recipe is not None:
        graph.metadata_props["normswap.recipe"] = recipe.model_dump_json()
    weights = sum(
        value.const_value.nbytes
        for value in graph.graph.initializers.values()
        if value.const_value is not None
    )
    with replacing(path) as scratch:
        with _quiet():
            program.save(scratch, external_data=weights > EXTERNAL_DATA_BYTES)
        try:
            # By path: a model above 2 GB cannot be checked in memory.
            onnx.checker.check_model(str(scratch), full_check=True)
        except Exception as error:  # the checker's and the shape inference's have no common base
            raise NormswapError(
                f"torch wrote a file that onnx.checker refuses ({one_line(error)}); "
                "try another opset, or float32"
            ) from error
        validation = validate_file(scratch, model, inputs) if validate else None
        size = sum(file.stat().st_size for file in scratch.parent.iterdir())
    shapes = _shapes(graph.graph.inputs)
    return ExportReport(
        path=path,
        opset=written,
        bytes=size,
        dynamic=any(isinstance(size, str) for shape in shapes.values() for size in shape),
        inputs=shapes,
        outputs=_shapes(graph.graph.outputs),
        operators=dict(Counter(node.op_type for node in graph.graph.all_nodes()).most_common()),
        passed=validation is None or validation.passed,
        validation=validation,
    )


def _translate(
    model: nn.Module, call: Call, opset: int | None, dynamic: bool
) -> torch.onnx.ONNXProgram:
    args, kwargs = _pytree.tree_map_only(torch.Tensor, torch.clone, call)
    shapes = None
    if dynamic:
        (args, kwargs), shapes = _dynamic_batch(model, (args, kwargs))
    try:
        with _quiet(), torch.no_grad():
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


def _dynamic_batch(model: nn.Module, call: Call) -> tuple[Call, dict[str, Any]]:
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
        call = _pytree.tree_map(lambda t: torch.cat([t, t]) if batched(t) else t, call)
        size = 2
    args, kwargs = call
    arguments = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    return call, _pytree.tree_map(lambda leaf: {0: "batch"} if batched(leaf) else None, arguments)


def _essence(error: BaseException, dynamic: bool) -> str:
    """One line from torch's pages: the operator, or the innermost reason."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error)
    operator = re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", text)
    if operator:
        return f"operator {operator[1]} has no ONNX form; replace it in the model by ones that have"
    if dynamic and re.search(r"Constraints violated|user-specified ranges|speciali[sz]ed", text):
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


def _possible_opsets() -> str:
    return (
        f"torch {torch.__version__} writes {_NATIVE_OPSET} to {_constants.ONNX_MAX_OPSET}, and "
        f"{_constants.ONNX_MIN_OPSET} to {_NATIVE_OPSET - 1} for models whose operators all have "
        "an older form"
    )


def _shapes(values: Any) -> dict[str, list[int | str]]:
    return {
        value.name: [size if isinstance(size, int) else str(size) for size in value.shape or ()]
        for value in values
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's prints, warnings and log records from the terminal."""
    disabled = logging.root.manager.disable
    sink = io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(sink),
        contextlib.redirect_stderr(sink),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)
