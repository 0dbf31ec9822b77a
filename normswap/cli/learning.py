"""The commands that fit a model to data."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normswap.cli.options import (
    Accumulate,
    BatchSize,
    Checkpoint,
    Crop,
    Debug,
    Device,
    Flip,
    Input,
    Json,
    Mean,
    MemoryLimit,
    Model,
    Out,
    PrecisionOption,
    Resume,
    Samples,
    SaveEvery,
    Seed,
    SourceOption,
    Std,
    Steps,
    check_number,
    numbers,
)
from normswap.cli.steps import (
    command,
    finish,
    folder_for,
    going_on,
    open_model,
    place,
    seed_all,
    working,
)

if TYPE_CHECKING:
    from normswap.report.rewrite import RewriteReport

Folder = Annotated[str, typer.Argument(metavar="FOLDER", help="A model that convert wrote.")]
Teacher = Annotated[str, typer.Option(help="The original model, as a MODEL.")]
DataNeeded = Annotated[str, typer.Option(help="As for convert.")]
Test = Annotated[
    str | None, typer.Option(help="Data to measure accuracy on; default: a part of --data.")
]


def calibrate(
    model: Folder,
    teacher: Teacher,
    data: DataNeeded,
    checkpoint: Checkpoint = None,
    source: SourceOption = None,
    test: Test = None,
    samples: Samples = 2000,
    mean: Mean = None,
    std: Std = None,
    out: Out = None,
    json: Json = False,
    memory_limit: MemoryLimit = None,
    debug: Debug = False,
) -> None:
    """Fit the normalizations of a converted model to those of the original, on data.

    --checkpoint holds the weights of the original.
    """
    from normswap.fit.data import open_named, open_split
    from normswap.report.converted import calibrated
    from normswap.report.rewrite import deliver

    center, spread = numbers("--mean", mean), numbers("--std", std)
    folder = folder_for(out or Path(model), model, "")
    with working("reading the models and the data"):
        student = open_model(model, None, source, None)
        original = open_model(teacher, checkpoint, None, None)
        training, held_out, measured_on = open_split(data, samples, original.inputs, center, spread)
        if test is not None:
            held_out, measured_on = open_named(test, original.inputs, center, spread), test
    with working("calibrating"):
        report = calibrated(model, student.model, original.model, training, held_out, measured_on)
        report = deliver(
            report,
            student.model,
            folder,
            original=original.model,
            inputs=original.inputs,
            data=held_out,
            command=command(),
        )
    finish(report, json)


def recover(
    model: Folder,
    teacher: Teacher,
    data: DataNeeded,
    steps: Steps = 200,
    checkpoint: Checkpoint = None,
    source: SourceOption = None,
    test: Test = None,
    batch_size: BatchSize = 64,
    crop: Crop = 0,
    flip: Flip = False,
    lr: Annotated[float | None, typer.Option(help="The rate at the start.")] = None,
    accumulate: Accumulate = 1,
    precision: PrecisionOption = "no",
    device: Device = None,
    mean: Mean = None,
    std: Std = None,
    seed: Seed = 0,
    save_every: SaveEvery = 100,
    resume: Resume = False,
    out: Out = None,
    json: Json = False,
    memory_limit: MemoryLimit = None,
    debug: Debug = False,
) -> None:
    """Fine-tune a converted model until it does what the original does; labels are not needed.

    --checkpoint holds the weights of the original. Several processes: accelerate launch, torchrun.
    """
    from normswap.report.converted import recovered

    check_number("--lr", lr)
    folder = folder_for(out or Path(model), model, "")
    seed_all(seed)
    with working("reading the models and the data"):
        student = open_model(model, None, source, None)
        original = open_model(teacher, checkpoint, None, None)
        place(device, student.model, original.model)
        learned = _learning_data(data, test, original.inputs, batch_size, crop, flip, mean, std)
    seed_all(seed)
    with going_on():
        report = recovered(
            model,
            student.model,
            original.model,
            *learned,
            steps=steps,
            lr=lr,
            accumulate=accumulate,
            precision=precision,
            checkpoint=folder,
            save_every=save_every,
            resume=resume,
        )
    _deliver(report, student.model, folder, json, original.inputs, learned[1], original.model)


def finetune(
    model: Model,
    data: DataNeeded,
    steps: Steps = 1000,
    statistics: Annotated[
        str,
        typer.Option(
            help="BatchNorm statistics: eval = frozen, tune = frozen with less "
            "memory, update = keep updating them."
        ),
    ] = "eval",
    checkpoint: Checkpoint = None,
    source: SourceOption = None,
    input: Input = None,
    test: Test = None,
    batch_size: BatchSize = 64,
    crop: Crop = 0,
    flip: Flip = False,
    lr: Annotated[float, typer.Option(help="The rate at the start.")] = 0.01,
    momentum: Annotated[float, typer.Option(help="SGD momentum.")] = 0.9,
    weight_decay: Annotated[
        float, typer.Option(help="Weight decay (not applied to biases and normalization layers).")
    ] = 0.0,
    schedule: Annotated[
        str, typer.Option(help="cosine, or exponential (replaces weight decay, Li & Arora 2019).")
    ] = "cosine",
    clip: Annotated[float | None, typer.Option(help="The largest norm of the gradient.")] = None,
    accumulate: Accumulate = 1,
    precision: PrecisionOption = "no",
    device: Device = None,
    mean: Mean = None,
    std: Std = None,
    seed: Seed = 0,
    sync_batch_norm: Annotated[
        bool, typer.Option("--sync-batch-norm", help="Batch statistics of all processes.")
    ] = False,
    save_every: SaveEvery = 100,
    resume: Resume = False,
    out: Out = None,
    json: Json = False,
    memory_limit: MemoryLimit = None,
    debug: Debug = False,
) -> None:
    """Train a pretrained model on labelled data, its BatchNorm statistics frozen.

    Several processes: accelerate launch, torchrun.
    """
    from normswap.report.converted import finetuned

    check_number("--lr", lr)
    check_number("--clip", clip)
    check_number("--weight-decay", weight_decay, zero=True)
    folder = folder_for(out, model, "finetune")
    seed_all(seed)
    with working("reading the model and the data"):
        opened = open_model(model, checkpoint, source, input)
        place(device, opened.model)
        learned = _learning_data(data, test, opened.inputs, batch_size, crop, flip, mean, std)
    seed_all(seed)
    with going_on():
        report = finetuned(
            model,
            opened.model,
            *learned,
            steps=steps,
            statistics=statistics,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            schedule=schedule,
            clip=clip,
            accumulate=accumulate,
            precision=precision,
            sync_batch_norm=sync_batch_norm,
            checkpoint=folder,
            save_every=save_every,
            resume=resume,
        )
    _deliver(report, opened.model, folder, json, opened.inputs, learned[1])


def _learning_data(
    data: str,
    test: str | None,
    inputs: Any,
    batch_size: int,
    crop: int,
    flip: bool,
    mean: str | None,
    std: str | None,
) -> tuple[Any, Any, str]:
    """Data to learn from, in a new order each time, data to measure on, and what those are."""
    from normswap.fit.augment import shuffled
    from normswap.fit.data import open_named, open_split

    center, spread = numbers("--mean", mean), numbers("--std", std)
    training, held_out, measured_on = open_split(data, None, inputs, center, spread, batch_size)
    if test is not None:
        held_out, measured_on = open_named(test, inputs, center, spread), test
    return shuffled(training, crop=crop, flip=flip), held_out, measured_on


def _deliver(
    report: "RewriteReport",
    model: Any,
    folder: Path,
    json: bool,
    inputs: Any,
    data: Any,
    original: Any = None,
) -> None:
    """Write and show the result, in the first of several processes; its checkpoint goes."""
    from normswap.fit.checkpoints import FILE
    from normswap.fit.ranks import is_first
    from normswap.report.rewrite import deliver

    if is_first():
        report = deliver(
            report,
            model.cpu(),
            folder,
            original=None if original is None else original.cpu(),
            inputs=inputs,
            data=data,
            command=command(),
            gone=(FILE,),
        )
        finish(report, json)
