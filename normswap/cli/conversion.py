"""The command that replaces normalizations, and fits the new ones to data."""

from typing import Annotated

import typer

from normswap.cli.command import Beside
from normswap.cli.images import Images
from normswap.cli.options import (
    Augmentation,
    Comparison,
    DataOption,
    ModelOptions,
    Onnx,
    Output,
    Running,
    Samples,
    Saving,
    Seed,
    Selection,
    Set,
    Test,
    count,
    method_options,
)
from normswap.cli.steps import (
    check,
    command,
    finish,
    going_on,
    loss_named,
    open_data,
    seed_all,
    show_plan,
)
from normswap.core.terminal import working


def convert(
    *,
    to: Annotated[
        str, "Method to replace them by, such as group_norm or gn; normswap methods lists all."
    ],
    model: ModelOptions,
    data: DataOption = None,
    test: Test = None,
    samples: Samples = 2000,
    images: Images,
    groups: Annotated[
        str | None,
        typer.Option(
            "--groups",
            "--num-groups",
            help="Groups of group_norm: a number, 'at most 32', or auto (with --data).",
        ),
        Beside("--data", value="auto"),
    ] = None,
    channels_per_group: Annotated[
        int | None, count("Channels in each group of group_norm, instead of --groups.")
    ] = None,
    set: Set = None,
    selection: Selection,
    recover: Annotated[
        int,
        count("Number of steps of fine-tuning to the original, after calibration.", least=0),
        Beside("--data"),
    ] = 0,
    loss: Comparison = None,
    augmentation: Augmentation,
    seed: Seed = 0,
    saving: Saving,
    onnx: Onnx,
    output: Output,
    running: Running,
) -> None:
    """Replace normalizations by another method, and calibrate the new ones on data.

    Add --recover to close the accuracy gap that calibration leaves; `normswap recover` has more
    options. After a stop, even by kill -9, the same command with --resume continues from the last
    checkpoint.

    Examples:
        normswap convert demo:digits --to group_norm --data demo:digits
        normswap convert torchvision:resnet18 --to gn --groups 16 --dry-run
    """
    from normswap.api import decide
    from normswap.deploy.lower import target_named
    from normswap.fit.checkpoints import FILE
    from normswap.fit.data import first_samples
    from normswap.fit.ranks import is_first
    from normswap.fit.reading import first_inputs
    from normswap.fit.training import Settings
    from normswap.passes.plan import Plan, plan
    from normswap.passes.replace import replacement
    from normswap.report.converted import States, converted
    from normswap.report.rewrite import deliver

    options, target = method_options(groups, channels_per_group, set), target_named(onnx.target)
    replace = replacement(to, **selection.globs(), **options)
    comparison = loss_named(loss)
    folder = output.folder(model.model, to, resume=saving.resume)
    if recover and folder is not None:
        Settings(recover, checkpoint=folder, resume=saving.resume).check_folder()
    seed_all(seed)
    with working("reading the model and the data"):
        opened = model.open()
        inputs, training = opened.inputs, None
        whole, held_out, measured_on = open_data(data, test, opened, images.of(opened))
        if whole is not None:
            training = first_samples(whole, samples)
            inputs = first_inputs(opened.model, training) if inputs is None else inputs
        check(opened.model, inputs)
    if folder is None:
        with working("planning"):
            owned = Plan()
            if training is not None:
                owned, replace = decide(opened.model, replace, inputs, training)
            decided = plan(owned.apply(opened.model), replace, inputs=inputs)
        show_plan(owned + decided, opened, running.json, output.all)
        return
    seed_all(seed)
    with working("converting"), going_on():
        student, report = converted(
            States(model.model, held_out, measured_on, {"original": opened.weights}),
            opened.model,
            replace,
            inputs,
            training,
            augmentation.shuffled(whole) if recover else None,
            steps=recover,
            loss=comparison,
            checkpoint=folder,
            save_every=saving.save_every,
            resume=saving.resume,
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
            onnx=onnx.onnx,
            opset=onnx.opset,
            target=target,
            command=command(),
            gone=(FILE,) if recover else (),
        )
    finish(report, running.json, output.all)
