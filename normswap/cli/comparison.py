"""The command that compares two models."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from normswap.cli.options import (
    MODEL_HELP,
    Checkpoint,
    Data,
    Debug,
    Input,
    Json,
    Mean,
    MemoryLimit,
    Out,
    SourceOption,
    Std,
    numbers,
)
from normswap.cli.steps import command, folder_for, needed, open_model, show_report, working
from normswap.core.errors import NormswapError

if TYPE_CHECKING:
    from normswap.source import Source

Compared = Annotated[str, typer.Argument(help=f"{MODEL_HELP}, or an .onnx file")]


def compare(
    a: Compared,
    b: Compared,
    checkpoint: Checkpoint = None,
    source: SourceOption = None,
    checkpoint_b: Annotated[Path | None, typer.Option(help="As --checkpoint, of B.")] = None,
    source_b: Annotated[str | None, typer.Option(help="As --source, of B.")] = None,
    input: Input = None,
    data: Data = None,
    mean: Mean = None,
    std: Std = None,
    out: Out = None,
    json: Json = False,
    memory_limit: MemoryLimit = None,
    debug: Debug = False,
) -> None:
    """Hold a model B against a model A: outputs, accuracy, latency, size, and how each normalizes.

    Either may be an .onnx file. --checkpoint and --source are those of A.
    """
    from normswap.fit.splits import open_named
    from normswap.report.comparison import compare as held_against

    center, spread = numbers("--mean", mean), numbers("--std", std)
    folder = folder_for(out, a, "compared")
    with working("reading the models and the data"):
        one = _open(a, checkpoint, source, input)
        other = _open(b, checkpoint_b, source_b, input)
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
    show_report(report, json)


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
