"""The commands that change a model and write the result to a folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normswap.cli.options import (
    MOST,
    AssumeExample,
    Beside,
    Checkpoint,
    Crop,
    DataOption,
    Debug,
    DryRun,
    Exclude,
    Flip,
    Include,
    Input,
    Json,
    Mean,
    MemoryLimit,
    Model,
    Opset,
    Out,
    Resume,
    Samples,
    SaveEvery,
    Seed,
    Set,
    SourceOption,
    Std,
    TargetOption,
    method_options,
    numbers,
)
from normswap.cli.steps import (
    check,
    command,
    finish,
    folder_for,
    going_on,
    needed,
    open_model,
    seed_all,
    show_plan,
    working,
)

if TYPE_CHECKING:
    from normswap.source import Source


def convert(
    model: Model,
    to: Annotated[str, typer.Option(help="The method; normswap methods lists them.")],
    checkpoint: Checkpoint = None,
    source: SourceOption = None,
    input: Input = None,
    data: DataOption = None,
    test: Annotated[
        str | None,
        typer.Option(help="Data to measure accuracy on; default: a part of --data."),
    ] = None,
    samples: Samples = 2000,
    mean: Mean = None,
    std: Std = None,
    groups: Annotated[
        str | None,
        typer.Option(help="Groups of group_norm: a number, or auto (with --data)."),
        Beside("--data", value="auto"),
    ] = None,
    channels_per_group: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="The same, by the channels in a group.")
    ] = None,
    set: Set = None,
    include: Include = None,
    exclude: Exclude = None,
    recover: Annotated[
        int,
        typer.Option(
            min=0, max=MOST, help="Steps of fine-tuning to the original, after calibration."
        ),
        Beside("--data"),
    ] = 0,
    crop: Crop = 0,
    flip: Flip = False,
    seed: Seed = 0,
    save_every: SaveEvery = 100,
    resume: Resume = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="Export to ONNX as well.")] = False,
    opset: Opset = None,
    target: TargetOption = "generic",
    out: Out = None,
    dry_run: DryRun = False,
    json: Json = False,
    memory_limit: MemoryLimit = None,
    debug: Debug = False,
) -> None:
    """Replace normalizations by another method, and calibrate the new ones on data.

    Add --recover to close the accuracy gap that calibration leaves; `normswap recover` has more
    options. After a stop, even by kill -9, the same command with --resume goes on from the last
    checkpoint.
    """
    from normswap.api import decide
    from normswap.deploy.lower import target_named
    from normswap.fit.augment import shuffled
    from normswap.fit.checkpoints import FILE
    from normswap.fit.data import first_samples, open_named, open_split
    from normswap.fit.ranks import is_first
    from normswap.fit.reading import first_inputs
    from normswap.fit.training import Settings
    from normswap.passes.plan import Plan, plan
    from normswap.passes.replace import replacement
    from normswap.report.converted import converted
    from normswap.report.rewrite import deliver

    options, chosen = method_options(groups, channels_per_group, set), target_named(target)
    replace = replacement(to, include=include or None, exclude=exclude or (), **options)
    center, spread = numbers("--mean", mean), numbers("--std", std)
    folder = None if dry_run else folder_for(out, model, to)
    if recover and folder is not None:
        Settings(recover, checkpoint=folder, resume=resume).check_folder()
    seed_all(seed)
    with working("reading the model and the data"):
        opened = open_model(model, checkpoint, source, input)
        inputs, held_out, measured_on = opened.inputs, None, ""
        whole: Any = None
        training: Any = None
        if data is not None:
            whole, held_out, measured_on = open_split(data, None, inputs, center, spread)
            training = first_samples(whole, samples)
            inputs = first_inputs(opened.model, training) if inputs is None else inputs
        if test is not None:
            held_out, measured_on = open_named(test, inputs, center, spread), test
        check(opened.model, inputs)
    if folder is None:
        with working("planning"):
            owned = Plan()
            if training is not None:
                owned, replace = decide(opened.model, replace, inputs, training)
            decided = plan(owned.apply(opened.model), replace, inputs=inputs)
        show_plan(owned + decided, json)
        return
    seed_all(seed)
    with working("converting"), going_on():
        student, report = converted(
            model,
            opened.model,
            replace,
            inputs,
            training,
            held_out,
            measured_on,
            shuffled(whole, crop=crop, flip=flip) if recover else None,
            steps=recover,
            checkpoint=folder,
            save_every=save_every,
            resume=resume,
        )
        if not is_first():  # of the processes that recovered it together
            return
        report = deliver(
            report,
            student,
            folder,
            original=opened.model,
            inputs=inputs,
            data=held_out,
            onnx=onnx,
            opset=opset,
            target=chosen,
            command=command(),
            gone=(FILE,) if recover else (),
        )
    finish(report, json)


def fold(
    model: Model,
    checkpoint: Checkpoint = None,
    source: SourceOption = None,
    input: Input = None,
    include: Include = None,
    exclude: Exclude = None,
    channels_last: Annotated[
        bool,
        typer.Option(
            "--channels-last", help="Store weights channels-last (faster convolutions on CPUs)."
        ),
    ] = False,
    duplicate: Annotated[
        bool,
        typer.Option(
            "--duplicate",
            help="Duplicate a layer that feeds several others, where that is cheaper "
            "than keeping a scale and shift.",
        ),
    ] = False,
    assume_example: AssumeExample = False,
    pad: Annotated[
        bool,
        typer.Option("--pad", help="Fold into convolutions that pad with zeros, where cheaper."),
    ] = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="Export to ONNX as well.")] = False,
    opset: Opset = None,
    target: TargetOption = "generic",
    out: Out = None,
    dry_run: DryRun = False,
    json: Json = False,
    memory_limit: MemoryLimit = None,
    debug: Debug = False,
) -> None:
    """Absorb frozen BatchNorm statistics into the weights around them, for inference."""
    from normswap.passes import Fold

    each = Fold(
        include=include or None,
        exclude=exclude or (),
        channels_last=channels_last,
        duplicate=duplicate,
        assume_example=assume_example,
        pad=pad,
    )
    folder = None if dry_run else folder_for(out, model, "fold")
    opened = open_model(model, checkpoint, source, input)
    _rewrite(opened, each, "fold", folder, json, onnx=onnx, opset=opset, target=target)


def center(
    model: Model,
    checkpoint: Checkpoint = None,
    source: SourceOption = None,
    input: Input = None,
    include: Include = None,
    exclude: Exclude = None,
    trainable: Annotated[
        bool, typer.Option("--trainable", help="Center weights whenever they are used, not once.")
    ] = False,
    assume_example: AssumeExample = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="Export to ONNX as well.")] = False,
    opset: Opset = None,
    target: TargetOption = "generic",
    out: Out = None,
    dry_run: DryRun = False,
    json: Json = False,
    memory_limit: MemoryLimit = None,
    debug: Debug = False,
) -> None:
    """Turn LayerNorms into RMSNorms, exactly: the preceding weights subtract the mean."""
    from normswap.passes import Center

    each = Center(
        include=include or None,
        exclude=exclude or (),
        trainable=trainable,
        assume_example=assume_example,
    )
    folder = None if dry_run else folder_for(out, model, "center")
    opened = open_model(model, checkpoint, source, input)
    _rewrite(opened, each, "center", folder, json, onnx=onnx, opset=opset, target=target)


def absorb_input(
    model: Model,
    checkpoint: Checkpoint = None,
    source: SourceOption = None,
    input: Input = None,
    mean: Mean = None,
    std: Std = None,
    assume_example: AssumeExample = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="Export to ONNX as well.")] = False,
    opset: Opset = None,
    target: TargetOption = "generic",
    out: Out = None,
    dry_run: DryRun = False,
    json: Json = False,
    memory_limit: MemoryLimit = None,
    debug: Debug = False,
) -> None:
    """Move (x / 255 - mean) / std into the first layers, so that the model takes raw pixels.

    Without --mean and --std it is ImageNet's.
    """
    from normswap.fit.data import IMAGENET_MEAN, IMAGENET_STD
    from normswap.passes import AbsorbInput
    from normswap.report.measurements import Normalized, pixels

    center, spread = numbers("--mean", mean), numbers("--std", std)
    each = AbsorbInput(
        center or IMAGENET_MEAN, spread or IMAGENET_STD, assume_example=assume_example
    )
    folder = None if dry_run else folder_for(out, model, "raw")
    opened = open_model(model, checkpoint, source, input)
    inputs = needed(opened.inputs)
    before = Normalized(opened.model, each), pixels(inputs, each)
    _rewrite(
        opened,
        each,
        "raw",
        folder,
        json,
        onnx=onnx,
        opset=opset,
        target=target,
        before=before,
    )


def freeze(
    model: Model,
    mode: Annotated[
        str, typer.Option(help="eval: fixed statistics; tune: computed by the weight before.")
    ] = "eval",
    checkpoint: Checkpoint = None,
    source: SourceOption = None,
    input: Input = None,
    include: Include = None,
    exclude: Exclude = None,
    assume_example: AssumeExample = False,
    out: Out = None,
    dry_run: DryRun = False,
    json: Json = False,
    memory_limit: MemoryLimit = None,
    debug: Debug = False,
) -> None:
    """Fix BatchNorm statistics for fine-tuning."""
    from normswap.passes import Freeze

    each = Freeze(
        mode,  # type: ignore[arg-type]
        include=include or None,
        exclude=exclude or (),
        assume_example=assume_example,
    )
    folder = None if dry_run else folder_for(out, model, f"freeze-{mode}")
    opened = open_model(model, checkpoint, source, input)
    _rewrite(opened, each, f"freeze-{mode}", folder, json)


def parametrize(
    model: Model,
    method: Annotated[str, typer.Option(help="A weight method; normswap methods lists them.")],
    checkpoint: Checkpoint = None,
    source: SourceOption = None,
    input: Input = None,
    set: Set = None,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Glob on names of convolutions and Linears; default: all of them."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Glob on names of those to leave alone.")
    ] = None,
    out: Out = None,
    dry_run: DryRun = False,
    json: Json = False,
    memory_limit: MemoryLimit = None,
    debug: Debug = False,
) -> None:
    """Let a method compute the weights: weight_norm, spectral_norm, weight standardization."""
    from normswap.passes import Parametrize

    options = method_options(None, None, set)
    each = Parametrize(method, include=include or None, exclude=exclude or (), **options)
    # With other options than its own a method may change the function, as its paper does.
    exact = each.method.keeps == "exact" and not options
    folder = None if dry_run else folder_for(out, model, method)
    opened = open_model(model, checkpoint, source, input)
    _rewrite(opened, each, method, folder, json, exact=exact)


def bake(
    model: Model,
    checkpoint: Checkpoint = None,
    source: SourceOption = None,
    input: Input = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Glob on names of modules; default: all of them.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Glob on names of modules to leave alone.")
    ] = None,
    out: Out = None,
    dry_run: DryRun = False,
    json: Json = False,
    memory_limit: MemoryLimit = None,
    debug: Debug = False,
) -> None:
    """Replace every parametrized tensor by its value."""
    from normswap.passes import Bake

    each = Bake(include=include or None, exclude=exclude or ())
    folder = None if dry_run else folder_for(out, model, "bake")
    _rewrite(open_model(model, checkpoint, source, input), each, "bake", folder, json)


def _rewrite(
    opened: "Source",
    each: Any,
    verb: str,
    folder: Path | None,
    json: bool,
    *,
    onnx: bool = False,
    opset: int | None = None,
    target: str = "generic",
    exact: bool = True,
    before: tuple[Any, Any] | None = None,
) -> None:
    """Plan one pass, and unless it is a dry run carry it out, compare outputs and write it.

    Args:
        folder: where to write; None for a dry run.
        before: what the result is to compute, and inputs of both, if these are not the model and
            its own.
    """
    from normswap.deploy.lower import target_named
    from normswap.passes.plan import carry_out, plan
    from normswap.report.outputs import compare_outputs
    from normswap.report.rewrite import RewriteReport, deliver

    chosen = target_named(target)
    with working(verb):
        check(opened.model, opened.inputs)
        if folder is None:
            decided = plan(opened.model, each, inputs=opened.inputs)
    if folder is None:
        show_plan(decided, json)
        return
    with working(verb):
        changed, decided = carry_out(opened.model, each, inputs=opened.inputs)
        report = RewriteReport(model=opened.reference, plan=decided)
        original, inputs = before or (opened.model, opened.inputs)
        if inputs is not None:
            compared = compare_outputs(original, changed, inputs)
            deviation, allowed = compared or (None, None)
            allowed = allowed if exact else None
            report = report.model_copy(update={"deviation": deviation, "allowed": allowed})
        report = deliver(
            report,
            changed,
            folder,
            original=original,
            inputs=needed(inputs) if onnx else inputs,
            onnx=onnx,
            opset=opset,
            target=chosen,
            command=command(),
        )
    finish(report, json)
