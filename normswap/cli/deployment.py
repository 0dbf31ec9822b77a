"""The commands that write an ONNX file, validate one against its model, and compare two models."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normswap.cli.command import Beside
from normswap.cli.options import (
    DATA,
    MODEL_HELP,
    Checkpoint,
    DataOption,
    Device,
    Input,
    ModelOptions,
    Opset,
    Out,
    Running,
    Scaling,
    SourceOption,
    TargetOption,
    check_number,
    count,
)
from normswap.cli.steps import command, folder_for, needed, open_model, placed, show
from normswap.core.errors import NormswapError
from normswap.core.shown import LONGEST_NAME, shown
from normswap.core.terminal import working

FEWER_BITS = ("float16", "int8", "int8_weight_only", "int4_weight_only")


def export(
    *,
    model: ModelOptions,
    opset: Opset = None,
    static: Annotated[bool, "Fix the batch size to that of the example inputs."] = False,
    dynamic_size: Annotated[bool, "The same as --dynamic size."] = False,
    dynamic: Annotated[
        list[str] | None,
        "Sizes left open: batch, size (height and width, or length, as well), all, or the axes of "
        "an input, x:0=batch,1=length; repeat for several inputs. Default: batch.",
    ] = None,
    target: TargetOption = "generic",
    precision: Annotated[
        str,
        "float32, float16, int8 (folded and quantized on --data), int8_weight_only or "
        "int4_weight_only (of matrix products, for ONNX Runtime).",
    ] = "float32",
    output_names: Annotated[
        str | None, "Names of the outputs in the file: logits, or logits,features."
    ] = None,
    data: DataOption = None,
    samples: Annotated[
        int,
        count("Number of samples of --data on which fewer bits are measured and checked."),
        DATA,
        Beside("--data"),
        Beside(*(f"--precision {each}" for each in FEWER_BITS)),
    ] = 256,
    scaling: Scaling,
    out: Out = None,
    running: Running,
) -> None:
    """Write a model as ONNX and validate the file in ONNX Runtime.

    With --out FILE.onnx that file alone is written, and no report beside it.

    Examples:
        normswap export demo:digits --out digits.onnx
        normswap export demo:digits --dynamic size --target onnxruntime
    """
    from normswap.deploy.export import export as write
    from normswap.fit.data import first_samples, open_split
    from normswap.fit.reading import first_inputs
    from normswap.report.rewrite import ship

    if static + dynamic_size + bool(dynamic) > 1:
        raise NormswapError(
            "--static, --dynamic-size and --dynamic exclude each other; give one of them"
        )
    sizes = _sizes(dynamic or (["size"] if dynamic_size else []))
    center, spread = scaling.numbers()
    as_file = out is not None and out.suffix == ".onnx"
    place = out if out is not None and as_file else folder_for(out, model.model, "onnx")
    with working("exporting"):
        opened = model.open()
        inputs, training = opened.inputs, None
        if data is not None:
            whole, _, _ = open_split(data, None, inputs, center, spread)
            training = first_samples(whole, samples)
            inputs = first_inputs(opened.model, training) if inputs is None else inputs
        options: dict[str, Any] = {
            "opset": opset,
            "dynamic": sizes or not static,
            "target": target,
            "precision": precision,
            "data": training,
            "output_names": None if output_names is None else output_names.split(","),
        }
        if as_file:
            report = write(opened.model, needed(inputs), place, **options)
        else:
            given = model.model, opened.model, needed(inputs), place
            report = ship(*given, command=command(), **options)
    show([str(report)], report.model_dump(mode="json") if running.json else None)
    if not report.passed:
        raise typer.Exit(1)


def _sizes(given: list[str]) -> str | dict[str, dict[int, str]]:
    """What `normswap.export` takes as `dynamic`; "" for nothing.

    Raises:
        NormswapError: it has another form.
    """
    if len(given) <= 1 and not any(":" in text for text in given):
        return given[0] if given else ""
    named: dict[str, dict[int, str]] = {}
    for text in given:
        match = re.fullmatch(r"(\w+):(\d{1,2}=\w+(?:,\d{1,2}=\w+)*)", text)
        if match is None:
            raise NormswapError(
                f"--dynamic takes an input and its axes, such as x:0=batch,1=length, not "
                f"{shown(text, LONGEST_NAME)!r}; or one of batch, size and all alone"
            )
        axes = [pair.split("=") for pair in match[2].split(",")]
        if match[1] in named or len({int(axis) for axis, _ in axes}) < len(axes):
            raise NormswapError(
                f"--dynamic names an axis or an input twice: {text}; give each once"
            )
        named[match[1]] = {int(axis): name for axis, name in axes}
    return named


def validate(
    *,
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The ONNX file.")],
    model: ModelOptions,
    rtol: Annotated[float, "Relative tolerance."] = 1e-3,
    atol: Annotated[
        float, "Absolute tolerance, relative to the largest output where that is above 1."
    ] = 1e-5,
    running: Running,
) -> None:
    """Compare an ONNX file in ONNX Runtime with the model it was made from.

    Examples:
        normswap validate digits.onnx demo:digits
    """
    from normswap.deploy.validate import validate as compare

    check_number("--rtol", rtol, zero=True)
    check_number("--atol", atol, zero=True)
    with working("validating"):
        opened = model.open()
        report = compare(path, opened.model, opened.inputs, rtol=rtol, atol=atol)
    show([str(report)], report.model_dump(mode="json") if running.json else None)
    if not report.passed:
        raise typer.Exit(1)


if TYPE_CHECKING:
    from normswap.source import Source

Compared = Annotated[str, typer.Argument(help=f"{MODEL_HELP}, or an .onnx file")]


def compare(
    *,
    a: Compared,
    b: Compared,
    checkpoint: Checkpoint = None,
    source: SourceOption = None,
    checkpoint_b: Annotated[Path | None, "Weights of B, as --checkpoint has those of A."] = None,
    source_b: Annotated[str | None, "Factory that rebuilds B, as --source does A."] = None,
    input: Input = None,
    device: Device = None,
    data: DataOption = None,
    scaling: Scaling,
    out: Out = None,
    running: Running,
) -> None:
    """Compare model B with model A: outputs, accuracy, latency, size, and how each normalizes.

    Either may be an .onnx file. --checkpoint and --source are those of A.

    Examples:
        normswap compare demo:digits normswap-out/digits-fold --data demo:digits
    """
    from normswap.fit.data import open_named
    from normswap.report.comparison import compare as held_against
    from normswap.report.page import plain

    center, spread = scaling.numbers()
    folder = folder_for(out, a, "compared")
    with working("reading the models and the data"):
        one = placed(_open(a, checkpoint, source, input), device)
        other = placed(_open(b, checkpoint_b, source_b, input), device)
        inputs = other.inputs if one.inputs is None else one.inputs
        batches = None if data is None else open_named(data, inputs, center, spread)
        if batches is None:
            needed(inputs)
    with working("comparing"):
        report = held_against(
            one.model,
            other.model,
            inputs,
            data=batches,
            names=(a, b),
            measured_on=data or "",
            command=command(),
        ).write(folder)
    show(report.tables(), plain(report) if running.json else None)


def _open(
    reference: str, checkpoint: Path | None, source: str | None, input: list[str] | None
) -> "Source":
    if not reference.endswith(".onnx"):
        return open_model(reference, checkpoint, source, input)
    from normswap.report.onnx_model import OnnxModel
    from normswap.source import Source, parse_input

    if checkpoint or source:
        raise NormswapError(f"{reference!r} has its own weights; name no checkpoint or source")
    file = OnnxModel(Path(reference))
    given = tuple(parse_input(shape) for shape in input or ())
    return Source(reference, file, given or file.example())
