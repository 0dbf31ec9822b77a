"""The commands that change a model and write the result to a folder."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from normswap.cli.command import Beside
from normswap.cli.options import (
    AssumeExample,
    Augmentation,
    DataOption,
    ModelOptions,
    Onnx,
    Output,
    Running,
    Samples,
    Saving,
    Scaling,
    Seed,
    Selection,
    Set,
    Test,
    check_number,
    count,
    method_options,
    number,
)
from normswap.cli.steps import (
    check,
    command,
    finish,
    going_on,
    needed,
    seed_all,
    show_plan,
    working,
)
from normswap.core.errors import NormswapError
from normswap.core.shown import shown

if TYPE_CHECKING:
    from normswap.source import Source


def convert(
    *,
    to: Annotated[str, "The method; normswap methods lists them."],
    model: ModelOptions,
    data: DataOption = None,
    test: Test = None,
    samples: Samples = 2000,
    scaling: Scaling,
    groups: Annotated[
        str | None,
        "Groups of group_norm: a number, or auto (with --data).",
        Beside("--data", value="auto"),
    ] = None,
    channels_per_group: Annotated[
        int | None, count("The same, by the channels in a group.")
    ] = None,
    set: Set = None,
    selection: Selection,
    recover: Annotated[
        int,
        count("Steps of fine-tuning to the original, after calibration.", least=0),
        Beside("--data"),
    ] = 0,
    augmentation: Augmentation,
    seed: Seed = 0,
    saving: Saving,
    onnx: Onnx,
    output: Output,
    running: Running,
) -> None:
    """Replace normalizations by another method, and calibrate the new ones on data.

    Add --recover to close the accuracy gap that calibration leaves; `normswap recover` has more
    options. After a stop, even by kill -9, the same command with --resume goes on from the last
    checkpoint.
    """
    from normswap.api import decide
    from normswap.deploy.lower import target_named
    from normswap.fit.checkpoints import FILE
    from normswap.fit.data import first_samples, open_named, open_split
    from normswap.fit.ranks import is_first
    from normswap.fit.reading import first_inputs
    from normswap.fit.training import Settings
    from normswap.passes.plan import Plan, plan
    from normswap.passes.replace import replacement
    from normswap.report.converted import States, converted
    from normswap.report.rewrite import deliver

    options, target = method_options(groups, channels_per_group, set), target_named(onnx.target)
    replace = replacement(to, **selection.globs(), **options)
    center, spread = scaling.numbers()
    folder = output.folder(model.model, to)
    if recover and folder is not None:
        Settings(recover, checkpoint=folder, resume=saving.resume).check_folder()
    seed_all(seed)
    with working("reading the model and the data"):
        opened = model.open()
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
        show_plan(owned + decided, running.json)
        return
    seed_all(seed)
    with working("converting"), going_on():
        student, report = converted(
            States(model.model, held_out, measured_on),
            opened.model,
            replace,
            inputs,
            training,
            augmentation.shuffled(whole) if recover else None,
            steps=recover,
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
    finish(report, running.json)


def fold(
    *,
    model: ModelOptions,
    selection: Selection,
    channels_last: Annotated[
        bool, "Store weights channels-last (faster convolutions on CPUs)."
    ] = False,
    duplicate: Annotated[
        bool,
        "Duplicate a layer that feeds several others, where that is cheaper "
        "than keeping a scale and shift.",
    ] = False,
    assume_example: AssumeExample = False,
    pad: Annotated[bool, "Fold into convolutions that pad with zeros, where cheaper."] = False,
    onnx: Onnx,
    output: Output,
    running: Running,
) -> None:
    """Absorb frozen BatchNorm statistics into the weights around them, for inference."""
    from normswap.passes import Fold

    each = Fold(
        **selection.globs(),
        channels_last=channels_last,
        duplicate=duplicate,
        assume_example=assume_example,
        pad=pad,
    )
    _rewrite(model, each, "fold", output, running, onnx)


def fold_gains(
    *,
    model: ModelOptions,
    selection: Selection,
    assume_example: AssumeExample = False,
    untie: Annotated[bool, "Fold into a weight that another module shares, too."] = False,
    onnx: Onnx,
    output: Output,
    running: Running,
) -> None:
    """Fold gains and biases of LayerNorm, RMSNorm and others into the layers after them."""
    from normswap.passes import FoldAffine

    each = FoldAffine(**selection.globs(), assume_example=assume_example, untie=untie)
    _rewrite(model, each, "fold-gains", output, running, onnx)


def center(
    *,
    model: ModelOptions,
    selection: Selection,
    trainable: Annotated[bool, "Center weights whenever they are used, not once."] = False,
    assume_example: AssumeExample = False,
    onnx: Onnx,
    output: Output,
    running: Running,
) -> None:
    """Turn LayerNorms into RMSNorms, exactly: the preceding weights subtract the mean."""
    from normswap.passes import Center

    each = Center(**selection.globs(), trainable=trainable, assume_example=assume_example)
    _rewrite(model, each, "center", output, running, onnx)


def rotate(
    *,
    model: ModelOptions,
    matrix: Annotated[
        str,
        "hadamard, random, or pca: principal components of --data.",
        Beside("--data", value="pca"),
    ] = "hadamard",
    data: Annotated[DataOption, Beside("--matrix pca")] = None,
    heads: Annotated[bool, "Rotate the values of each attention, too."] = False,
    seed: Seed = 0,
    selection: Selection,
    assume_example: AssumeExample = False,
    untie: Annotated[bool, "Fold a gain into a weight that another module shares, too."] = False,
    onnx: Onnx,
    output: Output,
    running: Running,
) -> None:
    """Rotate the residual stream by an orthogonal matrix, exactly, before a quantizer rounds it."""
    from normswap.api import rotation
    from normswap.fit.data import open_named
    from normswap.passes import Rotate

    def with_data(opened: "Source") -> tuple[Any, Rotate]:
        batches = None if data is None else open_named(data, opened.inputs, None, None)
        each = rotation(
            opened.model,
            opened.inputs,
            with_=matrix,
            data=batches,
            heads=heads,
            seed=seed,
            assume_example=assume_example,
            untie=untie,
            **selection.globs(),
        )
        return opened.inputs, each

    _rewrite(model, with_data, "rotate", output, running, onnx)


def rescale(
    *,
    model: ModelOptions,
    data: Annotated[DataOption, Beside("--per tensor")] = None,
    scaling: Scaling,
    per: Annotated[
        str,
        "tensor: within the range; channel: equal ranges of neighbouring layers, without data.",
        Beside("--data", value="tensor"),
    ] = "tensor",
    limit: Annotated[
        str, "float16, square (for a runtime that squares in float16), or a number."
    ] = "float16",
    margin: Annotated[float, "How many times further than on the data values may reach."] = 2.0,
    include: Annotated[
        list[str] | None, "Glob on names of modules whose output to scale; default: all of them."
    ] = None,
    exclude: Annotated[list[str] | None, "Glob on names of modules to leave alone."] = None,
    assume_example: AssumeExample = False,
    onnx: Onnx,
    output: Output,
    running: Running,
) -> None:
    """Bring every activation into the range of float16, exactly, by powers of two in weights."""
    from normswap.api import rescaling
    from normswap.fit.data import open_named
    from normswap.fit.reading import repeatable
    from normswap.passes import Equalize, Rescale

    center, spread = scaling.numbers()
    check_number("--margin", margin)

    def with_data(opened: "Source") -> tuple[Any, Rescale | Equalize]:
        globs = Selection(include, exclude).globs()
        if per == "channel":
            return opened.inputs, Equalize(**globs, assume_example=assume_example)
        if per != "tensor":
            raise NormswapError(f"--per takes tensor or channel, not {shown(per)!r}")
        if data is None:
            raise NormswapError("the ranges are measured on data; add --data")
        batches = repeatable(open_named(data, opened.inputs, center, spread))
        return rescaling(
            opened.model,
            opened.inputs,
            batches,
            limit=limit if limit in ("float16", "square") else number("--limit", limit),
            margin=margin,
            assume_example=assume_example,
            **globs,
        )

    _rewrite(model, with_data, "rescale", output, running, onnx)


def absorb_input(
    *,
    model: ModelOptions,
    scaling: Scaling,
    assume_example: AssumeExample = False,
    onnx: Onnx,
    output: Output,
    running: Running,
) -> None:
    """Move (x / 255 - mean) / std into the first layers, so that the model takes raw pixels.

    Without --mean and --std it is ImageNet's.
    """
    from normswap.fit.data import IMAGENET_MEAN, IMAGENET_STD
    from normswap.passes import AbsorbInput
    from normswap.report.raw_pixels import Normalized, pixels

    mean, std = scaling.numbers()
    each = AbsorbInput(mean or IMAGENET_MEAN, std or IMAGENET_STD, assume_example=assume_example)

    def normalized(opened: "Source") -> tuple[Any, Any]:
        inputs = pixels(needed(opened.inputs), each)
        return Normalized(opened.model, each), inputs

    _rewrite(model, each, "raw", output, running, onnx, compared=normalized)


def freeze(
    *,
    mode: Annotated[str, "eval: fixed statistics; tune: computed by the weight before."] = "eval",
    model: ModelOptions,
    selection: Selection,
    assume_example: AssumeExample = False,
    output: Output,
    running: Running,
) -> None:
    """Fix BatchNorm statistics for fine-tuning."""
    from normswap.passes import Freeze

    each = Freeze(mode, **selection.globs(), assume_example=assume_example)  # type: ignore[arg-type]
    _rewrite(model, each, f"freeze-{mode}", output, running)


def parametrize(
    *,
    method: Annotated[str, "A weight method; normswap methods lists them."],
    model: ModelOptions,
    set: Set = None,
    include: Annotated[
        list[str] | None, "Glob on names of convolutions and Linears; default: all of them."
    ] = None,
    exclude: Annotated[list[str] | None, "Glob on names of those to leave alone."] = None,
    output: Output,
    running: Running,
) -> None:
    """Let a method compute the weights: weight_norm, spectral_norm, weight standardization."""
    from normswap.passes import Parametrize

    options = method_options(None, None, set)
    each = Parametrize(method, **Selection(include, exclude).globs(), **options)
    # With other options than its own a method may change the function, as its paper does.
    exact = each.method.keeps == "exact" and not options
    _rewrite(model, each, method, output, running, exact=exact)


def bake(
    *,
    model: ModelOptions,
    include: Annotated[list[str] | None, "Glob on names of modules; default: all of them."] = None,
    exclude: Annotated[list[str] | None, "Glob on names of modules to leave alone."] = None,
    output: Output,
    running: Running,
) -> None:
    """Replace every parametrized tensor by its value."""
    from normswap.passes import Bake

    _rewrite(model, Bake(**Selection(include, exclude).globs()), "bake", output, running)


def _rewrite(
    model: ModelOptions,
    each: Any,
    verb: str,
    output: Output,
    running: Running,
    onnx: Onnx | None = None,
    *,
    exact: bool = True,
    compared: Callable[["Source"], tuple[Any, Any]] | None = None,
) -> None:
    """Plan one pass, and unless it is a dry run carry it out, compare outputs and write it.

    Args:
        each: the pass, or what makes it of the model that is opened, with examples to plan it on.
        verb: what is done, for the name of the folder.
        compared: what the result is to compute, and inputs of both, if these are not the model and
            its own.
    """
    from normswap.deploy.lower import target_named
    from normswap.passes.plan import carry_out, plan
    from normswap.report.outputs import compare_outputs
    from normswap.report.rewrite import RewriteReport, deliver

    onnx = onnx or Onnx()
    folder = output.folder(model.model, verb)
    opened = model.open()
    original, inputs = compared(opened) if compared else (opened.model, opened.inputs)
    target = target_named(onnx.target)
    with working(verb):
        check(opened.model, opened.inputs)
        examples, each = each(opened) if callable(each) else (opened.inputs, each)
        if folder is None:
            decided = plan(opened.model, each, inputs=examples)
    if folder is None:
        show_plan(decided, running.json)
        return
    with working(verb):
        changed, decided = carry_out(opened.model, each, inputs=examples)
        report = RewriteReport(model=opened.reference, plan=decided)
        if inputs is not None:
            deviation, allowed = compare_outputs(original, changed, inputs) or (None, None)
            allowed = allowed if exact else None
            report = report.model_copy(update={"deviation": deviation, "allowed": allowed})
        report = deliver(
            report,
            changed,
            folder,
            original=original,
            inputs=needed(inputs) if onnx.onnx else inputs,
            onnx=onnx.onnx,
            opset=onnx.opset,
            target=target,
            command=command(),
        )
    finish(report, running.json)
