"""The commands that fit a rewritten model to data."""

from pathlib import Path
from typing import Annotated

import typer

from normswap.cli.options import (
    Checkpoint,
    Debug,
    Json,
    Mean,
    Out,
    Samples,
    SourceOption,
    Std,
    numbers,
)
from normswap.cli.steps import finish, open_model, working


def calibrate(
    model: Annotated[str, typer.Argument(metavar="FOLDER", help="A model that convert wrote.")],
    teacher: Annotated[str, typer.Option(help="The original model, as a MODEL.")],
    data: Annotated[str, typer.Option(help="As for convert.")],
    checkpoint: Checkpoint = None,
    source: SourceOption = None,
    test: Annotated[str | None, typer.Option(help="Data to measure accuracy on.")] = None,
    samples: Samples = 2000,
    mean: Mean = None,
    std: Std = None,
    out: Out = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Fit the normalizations of a converted model to those of the original, on data.

    --checkpoint holds the weights of the original.
    """
    from normswap.fit.splits import open_named, open_split
    from normswap.report.conversion import calibrated
    from normswap.report.rewrite import deliver

    center, spread = numbers("--mean", mean), numbers("--std", std)
    with working("reading the models and the data"):
        student = open_model(model, None, source, None)
        original = open_model(teacher, checkpoint, None, None)
        training, held_out, measured_on = open_split(data, samples, original.inputs, center, spread)
        if test is not None:
            held_out, measured_on = open_named(test, original.inputs, center, spread), test
    with working("calibrating"):
        report = calibrated(model, student.model, original.model, training, held_out, measured_on)
        report = deliver(report, student.model, out or Path(model))
    finish(report, json)
