"""The commands for ONNX: write a file, and compare one with its model."""

from pathlib import Path
from typing import Annotated

import typer

from normswap.cli.options import Checkpoint, Debug, Input, Json, Model, Opset, Out, SourceOption
from normswap.cli.steps import default_out, needed, open_model, show, working


def export(
    model: Model,
    checkpoint: Checkpoint = None,
    source: SourceOption = None,
    input: Input = None,
    opset: Opset = None,
    static: Annotated[bool, typer.Option("--static", help="Fix the batch size.")] = False,
    out: Out = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a model as ONNX and validate the file in ONNX Runtime."""
    from normswap.deploy.export import export as write_onnx

    with working("exporting"):
        opened = open_model(model, checkpoint, source, input)
        path = (out or default_out(model, "onnx")) / "model.onnx"
        report = write_onnx(
            opened.model, needed(opened.inputs), path, opset=opset, dynamic=not static
        )
    show([str(report)], report.model_dump(mode="json") if json else None)
    if not report.passed:
        raise typer.Exit(1)


def validate(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The ONNX file.")],
    model: Model,
    checkpoint: Checkpoint = None,
    source: SourceOption = None,
    input: Input = None,
    rtol: Annotated[float, typer.Option(help="Relative tolerance.")] = 1e-3,
    atol: Annotated[float, typer.Option(help="Absolute tolerance.")] = 1e-5,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare an ONNX file in ONNX Runtime with the model it was made from."""
    from normswap.deploy.validate import validate as compare

    with working("validating"):
        opened = open_model(model, checkpoint, source, input)
        report = compare(path, opened.model, opened.inputs, rtol=rtol, atol=atol)
    show([str(report)], report.model_dump(mode="json") if json else None)
    if not report.passed:
        raise typer.Exit(1)
