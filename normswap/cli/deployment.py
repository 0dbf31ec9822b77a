"""The commands that write an ONNX file, validate one against its model, and compare two models."""

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normswap.cli.command import Beside
from normswap.cli.images import Images
from normswap.cli.options import (
    DATA,
    MODEL_HELP,
    Checkpoint,
    CheckpointKey,
    DataOption,
    Device,
    Force,
    Input,
    ModelOptions,
    Opset,
    Out,
    Pretrained,
    Running,
    SourceOption,
    TargetOption,
    Test,
    check_number,
    count,
)
from normswap.cli.steps import (
    command,
    folder_for,
    needed,
    open_data,
    open_model,
    placed,
    show,
    show_of,
)
from normswap.core.errors import NormswapError, warn
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
    images: Images,
    out: Out = None,
    force: Force = False,
    running: Running,
) -> None:
    """Write a model as ONNX and validate the file in ONNX Runtime.

    With --out FILE.onnx that file alone is written, and no report beside it.

    Examples:
        normswap export demo:digits --out digits.onnx
        normswap export demo:digits --dynamic size --target onnxruntime
    """
    from normswap.deploy.export import export as write
    from normswap.fit.data import first_samples
    from normswap.fit.reading import first_inputs
    from normswap.report.rewrite import ship

    if static + dynamic_size + bool(dynamic) > 1:
        raise NormswapError(
            "--static, --dynamic-size and --dynamic exclude each other; give one of them"
        )
    sizes = _sizes(dynamic or (["size"] if dynamic_size else []))
    place = _place(out, model.model, force=force)
    with working("exporting"):
        opened = model.open()
        inputs, training = opened.inputs, None
        whole, _, _ = open_data(data, None, opened, images.of(opened))
        if whole is not None:
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
        if place.suffix == ".onnx":
            report = write(opened.model, needed(inputs), place, **options)
        else:
            report = ship(
                model.model,
                opened.model,
                needed(inputs),
                place,
                weights=opened.weights,
                images=getattr(training, "images", ""),
                command=command(),
                **options,
            )
    show_of(opened, [str(report)], report.model_dump(mode="json") if running.json else None)
    if not report.passed:
        raise typer.Exit(1)


def _place(out: Path | None, model: str, *, force: bool) -> Path:
    """The file that --out names, or a folder for it and its report.

    Raises:
        NormswapError: it cannot be written, or a result is there and `force` is false.
    """
    if out is None or out.suffix != ".onnx":
        return folder_for(out, model, "onnx", force=force)
    if out.is_file() and not force:
        raise NormswapError(
            f"{shown(out, LONGEST_NAME)!r} is there already; name another --out, or replace it "
            "with --force"
        )
    return out


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
    show_of(opened, [str(report)], report.model_dump(mode="json") if running.json else None)
    if not report.passed:
        raise typer.Exit(1)


if TYPE_CHECKING:
    from normswap.source import Source

_COMPARED = f"{MODEL_HELP}, or an .onnx file"


def compare(
    *,
    a: Annotated[str, typer.Argument(metavar="A", help=_COMPARED)],
    b: Annotated[str, typer.Argument(metavar="B", help=_COMPARED)],
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
    checkpoint_key: CheckpointKey = None,
    source: SourceOption = None,
    pretrained_b: Annotated[bool, "Load the pretrained weights of B."] = False,
    checkpoint_b: Annotated[Path | None, "Weights of B, as --checkpoint has those of A."] = None,
    checkpoint_key_b: Annotated[
        str | None,
        "Entry of the checkpoint of B, as --checkpoint-key is of that of A.",
        Beside("--checkpoint-b"),
    ] = None,
    source_b: Annotated[str | None, "Factory that rebuilds B, as --source does A."] = None,
    input: Input = None,
    device: Device = None,
    data: DataOption = None,
    test: Test = None,
    images: Images,
    out: Out = None,
    force: Force = False,
    running: Running,
) -> None:
    """Compare model B with model A: outputs, accuracy, latency, size, and how each normalizes.

    Either may be an .onnx file. --pretrained, --checkpoint and --source are those of A. Of --data
    the part is used that convert, recover and others hold out, of --test all.

    Examples:
        normswap compare demo:digits normswap-out/digits-fold --data demo:digits
    """
    from normswap.report.comparison import compare as held_against
    from normswap.report.page import plain

    folder = folder_for(out, a, "compared", force=force)
    with working("reading the models and the data"):
        one = placed(_open(a, checkpoint, source, input, pretrained, checkpoint_key), device)
        other = placed(
            _open(b, checkpoint_b, source_b, input, pretrained_b, checkpoint_key_b), device
        )
        known = one if one.inputs is not None else other
        known = replace(known, images=one.images or other.images)
        if other.images and other.images != known.images and (data or test):
            warn(
                "B is given the images that A takes, and its own configuration differs",
                stacklevel=2,
            )
        _, batches, measured_on = open_data(data, test, known, images.of(known))
        if batches is None:
            needed(known.inputs)
    with working("comparing"):
        report = held_against(
            one.model,
            other.model,
            known.inputs,
            data=batches,
            names=(a, b),
            weights=(one.weights, other.weights),
            measured_on=measured_on,
            command=command(),
        ).write(folder)
    show(report.tables(), plain(report) if running.json else None)


def _open(
    reference: str,
    checkpoint: Path | None,
    source: str | None,
    input: list[str] | None,
    pretrained: bool,
    key: str | None,
) -> "Source":
    if not reference.endswith(".onnx"):
        return open_model(
            reference, checkpoint, source, input, pretrained=pretrained, checkpoint_key=key
        )
    from normswap.report.onnx_model import OnnxModel
    from normswap.source import Source, parse_input

    if checkpoint or source or pretrained:
        raise NormswapError(f"{reference!r} has its own weights; name no checkpoint or source")
    file = OnnxModel(Path(reference))
    given = tuple(parse_input(shape) for shape in input or ())
    return Source(reference, file, given or file.example())
