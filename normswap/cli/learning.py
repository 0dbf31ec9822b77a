"""The commands that fit a model to data."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normswap.cli.images import Images
from normswap.cli.options import (
    All,
    Augmentation,
    Checkpoint,
    CheckpointKey,
    Comparison,
    Computing,
    DataNeeded,
    Device,
    Force,
    ModelOptions,
    Out,
    Pretrained,
    Running,
    Samples,
    Saving,
    Seed,
    SourceOption,
    Test,
    check_number,
    count,
)
from normswap.cli.steps import (
    check,
    command,
    finish,
    folder_for,
    folder_in_place,
    going_on,
    loss_named,
    open_data,
    open_model,
    place,
    seed_all,
)
from normswap.core.terminal import working

if TYPE_CHECKING:
    from normswap.report.rewrite import RewriteReport
    from normswap.source.source import Source

Folder = Annotated[
    str, typer.Argument(metavar="FOLDER", help="Folder of a converted model, as convert writes it.")
]
Teacher = Annotated[str, "Original model, named like a MODEL of convert."]
Steps = Annotated[int, count("Number of optimizer steps.")]
BatchSize = Annotated[
    int, count("Number of samples in a batch (of each process, if there are several).")
]


def calibrate(
    *,
    model: Folder,
    teacher: Teacher,
    data: DataNeeded,
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
    checkpoint_key: CheckpointKey = None,
    source: SourceOption = None,
    device: Device = None,
    test: Test = None,
    samples: Samples = 2000,
    images: Images,
    out: Out = None,
    force: Force = False,
    all: All = False,
    running: Running,
) -> None:
    """Fit the normalizations of a converted model to those of the original, on data.

    --checkpoint holds the weights of the original.

    Examples:
        normswap calibrate normswap-out/digits-group_norm --teacher demo:digits --data demo:digits
    """
    from normswap.report.converted import States, calibrated
    from normswap.report.rewrite import deliver

    folder = folder_in_place(out, model, force=force)
    with working("reading the models and the data"):
        opened = open_model(model, None, source, None)
        student = opened.model
        original = _original(teacher, checkpoint, checkpoint_key, pretrained)
        weights = {"original": original.weights, "converted": opened.weights}
        if device is not None:
            place(device, student, original.model)
        training, held_out, measured_on = open_data(
            data, test, original, images.of(original), samples=samples
        )
    with working("calibrating"):
        report = deliver(
            calibrated(
                States(model, held_out, measured_on, weights), student, original.model, training
            ),
            student.cpu(),
            folder,
            original=original.model.cpu(),
            inputs=original.inputs,
            data=held_out,
            command=command(),
        )
    finish(report, running.json, all, instead_of=model)


def recover(
    *,
    model: Folder,
    teacher: Teacher,
    data: DataNeeded,
    steps: Steps = 200,
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
    checkpoint_key: CheckpointKey = None,
    source: SourceOption = None,
    device: Device = None,
    test: Test = None,
    batch_size: BatchSize = 64,
    augmentation: Augmentation,
    loss: Comparison = None,
    lr: Annotated[
        float | None, "Initial learning rate; default: found by a few trial steps."
    ] = None,
    computing: Computing,
    images: Images,
    seed: Seed = 0,
    saving: Saving,
    out: Out = None,
    force: Force = False,
    all: All = False,
    running: Running,
) -> None:
    """Fine-tune a converted model to reproduce the original's outputs; labels are not needed.

    --checkpoint holds the weights of the original. For several processes start it with accelerate
    launch or torchrun.

    Examples:
        normswap recover normswap-out/digits-group_norm --teacher demo:digits --data demo:digits
    """
    from normswap.report.converted import States, recovered

    check_number("--lr", lr)
    comparison = loss_named(loss)
    folder = folder_in_place(out, model, force=force, resume=saving.resume)
    seed_all(seed)
    with working("reading the models and the data"):
        opened = open_model(model, None, source, None)
        student = opened.model
        original = _original(teacher, checkpoint, checkpoint_key, pretrained)
        weights = {"original": original.weights, "converted": opened.weights}
        place(device, student, original.model)
        training, held_out, measured_on = open_data(
            data, test, original, images.of(original), batch_size=batch_size
        )
        training = augmentation.shuffled(training)
    seed_all(seed)
    with going_on():
        report = recovered(
            States(model, held_out, measured_on, weights),
            student,
            original.model,
            training,
            steps=steps,
            loss=comparison,
            lr=lr,
            accumulate=computing.accumulate,
            precision=computing.precision,
            checkpoint=folder,
            save_every=saving.save_every,
            resume=saving.resume,
        )
    _deliver(
        report,
        student,
        folder,
        running,
        all,
        original.inputs,
        held_out,
        original.model,
        instead_of=model,
    )


def _original(
    teacher: str, checkpoint: Path | None, checkpoint_key: str | None, pretrained: bool
) -> "Source":
    """The model that a converted one is fitted to, whose inputs are known to be right."""
    options: dict[str, Any] = {"pretrained": pretrained, "checkpoint_key": checkpoint_key}
    original = open_model(teacher, checkpoint, None, None, **options)
    check(original.model, original.inputs)
    return original


def finetune(
    *,
    data: DataNeeded,
    steps: Steps = 1000,
    statistics: Annotated[
        str,
        "BatchNorm statistics: eval = frozen, tune = frozen with less "
        "memory, update = keep updating them.",
    ] = "eval",
    model: ModelOptions,
    test: Test = None,
    batch_size: BatchSize = 64,
    augmentation: Augmentation,
    lr: Annotated[float, "Initial learning rate."] = 0.01,
    momentum: Annotated[float, "SGD momentum."] = 0.9,
    weight_decay: Annotated[
        float, "Weight decay (not applied to biases and normalization layers)."
    ] = 0.0,
    schedule: Annotated[
        str, "cosine, or exponential (replaces weight decay, Li & Arora 2019)."
    ] = "cosine",
    clip: Annotated[float | None, "Clip the norm of the gradient to this."] = None,
    computing: Computing,
    images: Images,
    seed: Seed = 0,
    sync_batch_norm: Annotated[bool, "Compute batch statistics over all processes."] = False,
    saving: Saving,
    out: Out = None,
    force: Force = False,
    all: All = False,
    running: Running,
) -> None:
    """Train a pretrained model on labelled data, its BatchNorm statistics frozen.

    For several processes start it with accelerate launch or torchrun.

    Examples:
        normswap finetune demo:digits --data demo:digits --steps 100 --batch-size 4
    """
    from normswap.passes.recipe import set_weights
    from normswap.report.converted import States, finetuned
    from normswap.source.source import RANDOM

    check_number("--lr", lr)
    check_number("--clip", clip)
    check_number("--weight-decay", weight_decay, zero=True)
    folder = folder_for(out, model.model, "finetune", force=force, resume=saving.resume)
    seed_all(seed)
    with working("reading the model and the data"):
        opened = model.open()
        check(opened.model, opened.inputs)
        place(model.device, opened.model)
        training, held_out, measured_on = open_data(
            data, test, opened, images.of(opened), batch_size=batch_size
        )
        training = augmentation.shuffled(training)
    seed_all(seed)
    with going_on():
        report = finetuned(
            States(model.model, held_out, measured_on, {"original": opened.weights}),
            opened.model,
            training,
            steps=steps,
            statistics=statistics,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            schedule=schedule,
            clip=clip,
            accumulate=computing.accumulate,
            precision=computing.precision,
            sync_batch_norm=sync_batch_norm,
            checkpoint=folder,
            save_every=saving.save_every,
            resume=saving.resume,
        )
    if opened.weights == RANDOM:
        set_weights(opened.model, "trained by normswap finetune, from random ones")
    _deliver(report, opened.model, folder, running, all, opened.inputs, held_out)


def _deliver(
    report: "RewriteReport",
    model: Any,
    folder: Path,
    running: Running,
    all: bool,
    inputs: Any,
    data: Any,
    original: Any = None,
    *,
    instead_of: str = "",
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
        finish(report, running.json, all, instead_of=instead_of)
