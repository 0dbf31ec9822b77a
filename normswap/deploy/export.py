"""Write a model as an ONNX file, whole or not at all, and prove that it computes the same.

The exporter is torch's (torch.onnx with dynamo=True). Added here: parametrizations are baked, the
batch dimension is dynamic (`translate.py`), the graph is rewritten for its target (`lower/`) and in
fewer bits (`precision.py`), large weights lie beside the file, the recipe travels in its metadata.
"""

import gc
import inspect
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import onnx_ir as ir
import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

import normswap
from normswap.core.ambient import generators_kept, usual_settings
from normswap.core.atomic import check_writable, replacing
from normswap.core.compat import pytree
from normswap.core.errors import NormswapError
from normswap.core.paths import check_reachable
from normswap.core.results import Lines
from normswap.core.shown import LONGEST_NAME, shown
from normswap.core.types import Batches, Inputs
from normswap.deploy.diverge import Array, arrays, one_line
from normswap.deploy.lower import TARGETS, Target, lower, target_named
from normswap.deploy.on_data import call_of, check_on_data
from normswap.deploy.precision import (
    FLOAT16_TOLERANCE,
    Precision,
    to_float16,
    to_int8,
    to_weight_only,
)
from normswap.deploy.reference_run import bind, reference_copy, run_reference
from normswap.deploy.sizes import Dynamic
from normswap.deploy.translate import possible_opsets, quiet, translate
from normswap.deploy.validate import ValidationReport, check
from normswap.deploy.validate import validate as validate_file
from normswap.fit.batch import described, is_finite
from normswap.fit.reading import Reading, repeatable

# A protobuf ends at 2 GiB; what the graph itself needs is left room for.
EXTERNAL_DATA_BYTES = 2_000_000_000


class ExportReport(Lines, BaseModel):
    """What `export` wrote.

    `bytes` counts external data too; `inputs` and `outputs` map names to shapes, a dynamic size by
    its name; `operators` counts operator types; `passed`: no check that was asked for has failed.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    path: Path
    target: Target = "generic"
    precision: Precision = "float32"
    opset: int
    bytes: int
    dynamic: bool
    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]
    operators: dict[str, int]
    passed: bool
    validation: ValidationReport | None

    def summary(self) -> str:
        """Which file, and whether it passed."""
        found = f"; {self.validation.summary()}" if self.validation else ", not validated"
        return f"{self._file()}{found}"

    def _file(self) -> str:
        return shown(
            f"{self.path}: opset {self.opset}, {self.precision}, for {self.target}, "
            f"{self.bytes:,} bytes"
        )

    def __str__(self) -> str:
        def shapes(values: dict[str, list[int | str]]) -> str:
            return ", ".join(f"{name} {'x'.join(map(str, s))}" for name, s in values.items())

        lines = [
            self._file(),
            f"  inputs {shapes(self.inputs)}; outputs {shapes(self.outputs)}",
            "  " + ", ".join(f"{name} {count}" for name, count in self.operators.items()),
        ]
        found = [str(self.validation)] if self.validation else []
        return "\n".join([*map(shown, lines), *found])


@usual_settings()
def export(
    model: nn.Module,
    inputs: Inputs,
    path: str | Path,
    *,
    opset: int | None = None,
    dynamic: Dynamic = True,
    validate: bool = True,
    target: Target = "generic",
    precision: Precision = "float32",
    data: Batches | None = None,
    output_names: Sequence[str] | None = None,
) -> ExportReport:
    """Export `model` in eval mode, its parametrizations baked; `model` itself is not touched.

    A file that fails validation is written all the same, and the report's `passed` is False. On
    any error, or when interrupted, the previous file at `path` stays as it was.

    Args:
        inputs: A tensor, a tuple of positional or a dict of keyword inputs, tensors nested in
            them or not.
        path: The file; weights above 2 GB go to `<path>.data` beside it.
        opset: None for torch's default.
        dynamic: Which sizes the file leaves open. True or "batch": the number of samples, in every
            input that has as many as the first one. "size": height and width as well, or the length
            of sequences. "all": whatever the model takes in another size. Or names, as for
            torch.export: `{"tokens": {0: "batch", 1: "length"}}`, or an entry for each argument in
            order; `torch.export.Dim` in the place of a name.
        validate: Run `normswap.validate` on the file with `inputs`. In fewer bits the tolerances
            are for these, and it runs on `data` where there are: float16 with its values rounded
            to float16, int8 by how far the outputs agree (`normswap.deploy.agreement`).
        target: "generic" for standard operators as torch writes them; "onnxruntime" for those that
            ONNX Runtime's CPU runs fastest at these sizes (`normswap.deploy.lower`), float32 only;
            "tensorrt", "coreml" and "qnn" for standard operators that these take (docs/onnx.md).
        precision: "float32" leaves the model's own; "float16"; "int8" folds the model and quantizes
            it on `data`; "int8_weight_only" and "int4_weight_only" quantize the weights of matrix
            products, for ONNX Runtime.
        data: Batches that int8 takes the ranges of values from, and on which files in fewer bits
            are validated; all are read, more than once.
        output_names: What the outputs are called in the file, in order; None for torch's names.

    Raises:
        NormswapError: inputs that the model rejects, a model that torch cannot capture or that has
            an operator without ONNX form, a size in `dynamic` that is not there or that the model's
            code fixes, an impossible opset, target or precision, int8 without data, an unwritable
            folder, a file that ONNX Runtime cannot run.

    Examples:
        >>> import normswap
        >>> from normswap.demo.digits import digits, digits_data
        >>> model, images = digits(), digits_data("train")[0]
        >>> from tempfile import mkdtemp
        >>> path = f"{mkdtemp()}/digits.onnx"
        >>> normswap.export(model, images[:2], path).passed
        True
        >>> normswap.validate(path, model).passed
        True
    """
    path = Path(path)
    check_reachable(path)
    if path.is_dir():
        raise NormswapError(f"{str(path)!r} is a folder; name a file in it, such as model.onnx")
    check_writable(path.parent, (path.name,))
    _check_choice(target, precision, data, dynamic)
    if precision == "float32":
        data = None
    if data is not None:
        data = repeatable(data)
    with generators_kept():
        call = bind(model, inputs)
        traced = _plain(reference_copy(model, call), inputs, precision)
        scopes = frozenset[str]() if precision == "float32" else _normalizing(traced, inputs)
        outputs = run_reference(traced, call)  # the model's own complaint, before the tracer's
        if data is not None:
            _check_first(traced, data)
        program = translate(traced, call, outputs, opset, dynamic)
    graph = program.model
    written = graph.opset_imports[""]
    if opset is not None and written != opset:
        raise NormswapError(
            f"this model has operators without a form in opset {opset}; {possible_opsets()}"
        )
    lower(graph, target)
    if output_names is not None:
        _name_outputs(graph.graph, output_names)
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
    large = weights > EXTERNAL_DATA_BYTES
    with replacing(path) as scratch:
        with quiet():
            program.save(scratch, external_data=large)
        try:
            # By path: a model above 2 GB cannot be checked in memory.
            onnx.checker.check_model(str(scratch), full_check=True)
        except Exception as error:  # the checker's and the shape inference's have no common base
            raise NormswapError(
                f"torch wrote a file that onnx.checker refuses ({one_line(error)}); "
                "try another opset, or float32"
            ) from error
        if precision == "float16":
            to_float16(scratch, scopes, external_data=large)
        elif precision == "int8":
            assert data is not None
            to_int8(scratch, _feeds(model, data, graph.graph), scopes, external_data=large)
        elif precision != "float32":
            bits = 8 if precision == "int8_weight_only" else 4
            to_weight_only(scratch, bits, external_data=large)
        shapes, output_shapes = _shapes(graph.graph.inputs), _shapes(graph.graph.outputs)
        written_nodes = onnx.load(scratch, load_external_data=False).graph.node
        operators = Counter(node.op_type for node in written_nodes)
        # ONNX Runtime is going to load the file's weights: let go of the program's. The rewrite
        # rules of onnxscript keep hold of the last graph that they saw.
        for value in graph.graph.initializers.values():
            value.const_value = None
        del traced, program, graph
        if large:
            gc.collect()
        validation = _checked(scratch, model, inputs, precision, data) if validate else None
        size = sum(file.stat().st_size for file in scratch.parent.iterdir())
    return ExportReport(
        path=path,
        target=target,
        precision=precision,
        opset=written,
        bytes=size,
        dynamic=any(isinstance(size, str) for shape in shapes.values() for size in shape),
        inputs=shapes,
        outputs=output_shapes,
        operators=dict(operators.most_common()),
        passed=validation is None or validation.passed,
        validation=validation,
    )


def _name_outputs(graph: ir.Graph, names: Sequence[str]) -> None:
    """Let the outputs be called `names`."""
    outputs = graph.outputs
    taken = {value.name for node in graph.all_nodes() for value in node.outputs}
    taken |= {value.name for value in graph.inputs} | set(graph.initializers)
    taken -= {value.name for value in outputs}
    fit = len(names) == len(outputs) == len({*names}) and all(map(str.isidentifier, names))
    if not fit or not taken.isdisjoint(names):
        raise NormswapError(
            f"the model has {len(outputs)} outputs ({', '.join(str(v.name) for v in outputs)}), "
            f"which cannot be called {shown(', '.join(names), LONGEST_NAME)!r}; give as many "
            "names of letters, digits and _, all different, that nothing else in the file has"
        )
    for value, name in zip(outputs, names, strict=True):
        value.name = name


def _check_choice(
    target: Target, precision: Precision, data: Iterable[Any] | None, dynamic: Dynamic
) -> None:
    form = TARGETS[target_named(target)]
    if precision not in get_args(Precision):
        raise NormswapError(
            f"there is no precision {precision!r}; choose one of {', '.join(get_args(Precision))}"
        )
    if form.precisions is not None and precision not in form.precisions:
        raise NormswapError(
            f"the target {target!r} is for {' and '.join(form.precisions)}; export {precision} for "
            "the target 'generic'"
        )
    if form.fixed_sizes and dynamic is not False:
        raise NormswapError(
            f"the target {target!r} takes no file that leaves a size open; export with "
            "dynamic=False (--static)"
        )
    if precision == "int8" and data is None:
        raise NormswapError(
            "int8 takes the ranges of values from data; give some (--data), a few hundred samples"
        )


def _plain(model: nn.Module, inputs: Any, precision: Precision) -> nn.Module:
    """`model` without parametrizations and, for int8, without BatchNorms; in place."""
    from normswap.passes.inspection import inspect as inspected  # not needed to validate a file
    from normswap.passes.verbs import bake, fold

    if precision == "int8":
        inputs = _on_cpu(inputs)
        if any(site.kind == "batch" for site in inspected(model, inputs).sites):
            model = fold(model, inputs, inplace=True)
    return bake(model, inplace=True)


def _normalizing(model: nn.Module, inputs: Any) -> frozenset[str]:
    """The paths of the modules that compute statistics in eval mode.

    A BatchNorm with running ones is an affine, which torch's exporter merges into the convolution
    before it, under the path of the BatchNorm.
    """
    from normswap.graph.capture import capture
    from normswap.graph.sites import find_sites

    sites = find_sites(capture(model, _on_cpu(inputs)))
    computing = [site for site in sites if not site.has_fixed_affine and site.kind != "affine"]
    return frozenset(path for site in computing for path in site.paths)


def _on_cpu(inputs: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: t.detach().cpu(), inputs)


def _check_first(model: nn.Module, data: Iterable[Any]) -> None:
    """Refuse data without a batch, or of which the model does not take the first."""
    batches = Reading(data)
    for batch in batches:
        with batches.current():
            run_reference(model, call_of(model, batch))
        return
    raise NormswapError("there is no batch in the data; give some that hold samples")


def _feeds(model: nn.Module, data: Iterable[Any], graph: ir.Graph) -> Iterator[dict[str, Array]]:
    """The batches as ONNX Runtime takes them."""
    names = [str(value.name) for value in graph.inputs]
    batches = Reading(data)
    for batch in batches:
        with batches.current():
            values = arrays(call_of(model, batch))
            if not is_finite(batch):
                raise NormswapError("it holds numbers that are not finite; check the data")
            if not all(map(_fits, values, graph.inputs)):
                raise NormswapError(
                    f"it is {described(batch)}, unlike the inputs that the file takes; give "
                    "batches of their type and size"
                )
            feed = dict(zip(names, values, strict=True))
        yield feed


def _fits(given: Array, declared: ir.Value) -> bool:
    """Whether ONNX Runtime takes `given` for an input of the file."""
    if declared.dtype is None or given.dtype != declared.dtype.numpy():
        return False
    sizes = list(declared.shape or ())
    return len(sizes) == given.ndim and all(
        size == n or not isinstance(size, int) for size, n in zip(sizes, given.shape, strict=True)
    )


def _checked(
    path: Path, model: nn.Module, inputs: Any, precision: Precision, data: Iterable[Any] | None
) -> ValidationReport:
    """`validate`; in fewer bits with what holds for them, and on the data where there are."""
    if precision == "float32":
        return validate_file(path, model, inputs)
    if data is not None:
        tolerance = FLOAT16_TOLERANCE if precision == "float16" else None
        return check_on_data(path, model, data, tolerance=tolerance)
    if precision != "float16":
        return check_on_data(path, model, [_as_batch(model, inputs)], tolerance=None)
    call = bind(model, inputs)
    outputs = run_reference(reference_copy(model, call), call)
    peak = max((float(np.abs(output).max(initial=0)) for output in outputs), default=0.0)
    # Of the largest output, and `compare` scales with those above 1.
    return check(path, model, inputs, rtol=0, atol=FLOAT16_TOLERANCE * min(1.0, peak))


def _as_batch(model: nn.Module, inputs: Any) -> Any:
    """`inputs` as a batch, of which a tuple holds one input and the labels."""
    if not isinstance(inputs, tuple):
        return inputs
    return dict(inspect.signature(model.forward).bind(*inputs).arguments)


def _shapes(values: Any) -> dict[str, list[int | str]]:
    return {
        value.name: [size if isinstance(size, int) else str(size) for size in value.shape or ()]
        for value in values
    }
