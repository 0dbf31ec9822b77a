"""One thin function per verb; each imports what it needs itself, so that --help is fast."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from normswap import __version__
from normswap.cli.options import (
    Checkpoint,
    Data,
    Debug,
    DryRun,
    Exclude,
    Include,
    Input,
    Json,
    Mean,
    Model,
    Opset,
    Out,
    Samples,
    Set,
    SourceOption,
    Std,
    method_options,
    numbers,
)
from normswap.errors import NormswapError
from normswap.terminal import stderr

if TYPE_CHECKING:
    from normswap.passes.plan import Plan
    from normswap.report.rewrite import RewriteReport
    from normswap.source import Source

app = typer.Typer(
    name="normswap",
    help="Rewrite the normalization of PyTorch models: replace, fold, freeze, and ship to ONNX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def inspect(
    model: Model,
    checkpoint: Checkpoint = None,
    source: SourceOption = None,
    input: Input = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List the normalizations of a model, and what a fold could do with each."""
    from normswap.graph.inspection import inspect as look
    from normswap.report.tables import inspection_table

    with _working("inspecting"):
        opened = _open(model, checkpoint, source, input)
        inspection = look(opened.model, opened.inputs)
    _show(inspection_table(inspection), inspection.to_dict() if json else None)


@app.command()
def convert(
    model: Model,
    to: Annotated[str, typer.Option(help="The method; normswap methods lists them.")],
    checkpoint: Checkpoint = None,
    source: SourceOption = None,
    input: Input = None,
    data: Data = None,
    test: Annotated[
        str | None, typer.Option(help="Data to measure accuracy on; default: a part of --data.")
    ] = None,
    samples: Samples = 2000,
    mean: Mean = None,
    std: Std = None,
    groups: Annotated[
        str | None, typer.Option(help="Groups of group_norm: a number, or auto (with --data).")
    ] = None,
    channels_per_group: Annotated[
        int | None, typer.Option(min=1, help="The same, by the channels in a group.")
    ] = None,
    set: Set = None,
    include: Include = None,
    exclude: Exclude = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Export to ONNX as well.")] = False,
    opset: Opset = None,
    out: Out = None,
    dry_run: DryRun = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Replace normalizations by another method, and calibrate the new ones on data."""
    from normswap.fit.conversion import decide, first_inputs
    from normswap.fit.splits import open_named, open_split
    from normswap.passes.plan import Plan, plan
    from normswap.passes.replacement import replacement
    from normswap.report.conversion import converted
    from normswap.report.rewrite import deliver

    options = method_options(groups, channels_per_group, set)
    replace = replacement(to, include=include or None, exclude=exclude or (), **options)
    center, spread = numbers("--mean", mean), numbers("--std", std)
    with _working("reading the model and the data"):
        opened = _open(model, checkpoint, source, input)
        inputs, training, held_out, measured_on = opened.inputs, None, None, ""
        if data is not None:
            training, held_out, measured_on = open_split(data, samples, inputs, center, spread)
            inputs = first_inputs(training) if inputs is None else inputs
        if test is not None:
            held_out, measured_on = open_named(test, inputs, center, spread), test
        _check(opened.model, inputs)
    if dry_run:
        with _working("planning"):
            owned, decided = (
                (Plan(), plan(opened.model, replace, inputs=inputs))
                if training is None
                else decide(opened.model, replace, inputs, training)
            )
        _show_plan(owned + decided, json)
        return
    out = out or _default_out(model, to)
    with _working("converting"):
        student, report = converted(
            model, opened.model, replace, inputs, training, held_out, measured_on
        )
        report = deliver(report, student, out, inputs=inputs, onnx=onnx, opset=opset)
    _finish(report, json)


@app.command()
def fold(
    model: Model,
    checkpoint: Checkpoint = None,
    source: SourceOption = None,
    input: Input = None,
    include: Include = None,
    exclude: Exclude = None,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Lay the weights out for a CPU.")
    ] = False,
    duplicate: Annotated[
        bool, typer.Option("--duplicate", help="Copy a layer with several users where cheaper.")
    ] = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="Export to ONNX as well.")] = False,
    opset: Opset = None,
    out: Out = None,
    dry_run: DryRun = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Absorb frozen BatchNorm statistics into the weights around them, for inference."""
    from normswap.passes import Fold

    opened = _open(model, checkpoint, source, input)
    each = Fold(
        include=include or None,
        exclude=exclude or (),
        channels_last=channels_last,
        duplicate=duplicate,
    )
    _rewrite(opened, each, "fold", out, dry_run, json, onnx=onnx, opset=opset)


@app.command()
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
    onnx: Annotated[bool, typer.Option("--onnx", help="Export to ONNX as well.")] = False,
    opset: Opset = None,
    out: Out = None,
    dry_run: DryRun = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Turn LayerNorms into RMSNorms, exactly, by taking the mean off their inputs in weights."""
    from normswap.passes import Center

    opened = _open(model, checkpoint, source, input)
    each = Center(include=include or None, exclude=exclude or (), trainable=trainable)
    _rewrite(opened, each, "center", out, dry_run, json, onnx=onnx, opset=opset)


@app.command()
def absorb_input(
    model: Model,
    checkpoint: Checkpoint = None,
    source: SourceOption = None,
    input: Input = None,
    mean: Mean = None,
    std: Std = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Export to ONNX as well.")] = False,
    opset: Opset = None,
    out: Out = None,
    dry_run: DryRun = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Move (x / 255 - mean) / std into the first layers, so that the model takes raw pixels.

    Without --mean and --std it is ImageNet's.
    """
    from normswap.fit.splits import IMAGENET_MEAN, IMAGENET_STD
    from normswap.passes import AbsorbInput
    from normswap.report.pixels import Normalized, pixels

    center, spread = numbers("--mean", mean), numbers("--std", std)
    each = AbsorbInput(center or IMAGENET_MEAN, spread or IMAGENET_STD)
    opened = _open(model, checkpoint, source, input)
    inputs = _needed(opened.inputs)
    before = Normalized(opened.model, each), pixels(inputs, each)
    _rewrite(opened, each, "raw", out, dry_run, json, onnx=onnx, opset=opset, before=before)


@app.command()
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
    out: Out = None,
    dry_run: DryRun = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Fix BatchNorm statistics for fine-tuning."""
    from normswap.passes import Freeze

    opened = _open(model, checkpoint, source, input)
    each = Freeze(mode, include=include or None, exclude=exclude or ())  # type: ignore[arg-type]
    _rewrite(opened, each, f"freeze-{mode}", out, dry_run, json)


@app.command()
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
    debug: Debug = False,
) -> None:
    """Let a method compute the weights: weight_norm, spectral_norm, weight standardization."""
    from normswap.passes import Parametrize

    opened = _open(model, checkpoint, source, input)
    options = method_options(None, None, set)
    each = Parametrize(method, include=include or None, exclude=exclude or (), **options)
    # With other options than its own a method may change the function, as its paper does.
    exact = each.method.keeps == "exact" and not options
    _rewrite(opened, each, method, out, dry_run, json, exact=exact)


@app.command()
def bake(
    model: Model,
    checkpoint: Checkpoint = None,
    source: SourceOption = None,
    input: Input = None,
    out: Out = None,
    dry_run: DryRun = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Replace every parametrized tensor by its value."""
    from normswap.passes import Bake

    _rewrite(_open(model, checkpoint, source, input), Bake(), "bake", out, dry_run, json)


@app.command()
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
    with _working("reading the models and the data"):
        student = _open(model, None, source, None)
        original = _open(teacher, checkpoint, None, None)
        training, held_out, measured_on = open_split(data, samples, original.inputs, center, spread)
        if test is not None:
            held_out, measured_on = open_named(test, original.inputs, center, spread), test
    with _working("calibrating"):
        report = calibrated(model, student.model, original.model, training, held_out, measured_on)
        report = deliver(report, student.model, out or Path(model))
    _finish(report, json)


@app.command()
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

    with _working("exporting"):
        opened = _open(model, checkpoint, source, input)
        path = (out or _default_out(model, "onnx")) / "model.onnx"
        report = write_onnx(
            opened.model, _needed(opened.inputs), path, opset=opset, dynamic=not static
        )
    _show([str(report)], report.model_dump(mode="json") if json else None)
    if not report.passed:
        raise typer.Exit(1)


@app.command()
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

    with _working("validating"):
        opened = _open(model, checkpoint, source, input)
        report = compare(path, opened.model, opened.inputs, rtol=rtol, atol=atol)
    _show([str(report)], report.model_dump(mode="json") if json else None)
    if not report.passed:
        raise typer.Exit(1)


@app.command()
def methods(
    invariances: Annotated[
        bool,
        typer.Option("--invariances", help="Which changes of weights and data each does not see."),
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List the methods, what a conversion to each keeps, and their options; --json says more."""
    from normswap.norms.registry import methods as known
    from normswap.report.tables import METHOD_FACTS, invariances_table, methods_tables

    found = known()
    if invariances:
        from normswap.norms.invariances import invariances as compute

        with _working("computing"):
            stays = {name: compute(method) for name, method in found.items()}
        _show([invariances_table(stays)], stays if json else None)
        return
    plain = {
        name: {fact: getattr(method, fact) for fact in METHOD_FACTS}
        for name, method in found.items()
    }
    _show(methods_tables(found), plain if json else None)


# --- what the commands share ----------------------------------------------------------------------


def _open(
    model: str, checkpoint: Path | None, source: str | None, input: list[str] | None
) -> "Source":
    from normswap.graph.supported import check_supported
    from normswap.passes.recipe import recipe_of, set_source
    from normswap.source import resolve

    opened = resolve(model, checkpoint=checkpoint, input_shapes=input or (), source=source)
    check_supported(opened.model)
    if recipe_of(opened.model).source is None:
        set_source(opened.model, model)
    return opened


def _check(model: Any, inputs: Any) -> None:
    from normswap.source import check_runs

    if inputs is not None:
        check_runs(model, inputs)


def _needed(inputs: Any) -> Any:
    if inputs is None:
        raise NormswapError(
            "this needs example inputs; give the shape of one with --input, such as 1x3x224x224"
        )
    return inputs


def _rewrite(
    opened: "Source",
    each: Any,
    verb: str,
    out: Path | None,
    dry_run: bool,
    json: bool,
    *,
    onnx: bool = False,
    opset: int | None = None,
    exact: bool = True,
    before: tuple[Any, Any] | None = None,
) -> None:
    """Plan one pass, and unless it is a dry run carry it out, compare outputs and write it.

    Args:
        before: what the result is to compute, and inputs of both, if these are not the model and
            its own.
    """
    from normswap.passes.plan import plan
    from normswap.report.rewrite import RewriteReport, compare_outputs, deliver

    with _working(verb):
        _check(opened.model, opened.inputs)
        decided = plan(opened.model, each, inputs=opened.inputs)
    if dry_run:
        _show_plan(decided, json)
        return
    with _working(verb):
        changed = decided.apply(opened.model)
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
            out or _default_out(opened.reference, verb),
            inputs=_needed(inputs) if onnx else None,
            onnx=onnx,
            opset=opset,
        )
    _finish(report, json)


def _default_out(model: str, what: str) -> Path:
    """A folder for the result, named after the model and what was done to it."""
    name = Path(model.partition(":")[0]).stem if ".py:" in model else model.rpartition(":")[2]
    return Path("normswap-out") / f"{Path(name).name}-{what}"


def _working(what: str) -> Any:
    return stderr.status(f"{what} ...")


def _show(parts: list[Any], plain: Any) -> None:
    if plain is None:
        console = Console()
        for part in parts:
            console.print(part)
    else:
        from json import dumps

        print(dumps(plain, indent=2))


def _show_plan(decided: "Plan", json: bool) -> None:
    from normswap.report.tables import plan_table

    _show(plan_table(decided), decided.model_dump(mode="json") if json else None)


def _finish(report: "RewriteReport", json: bool) -> None:
    _show(report.tables(), report.model_dump(mode="json") if json else None)
    if not report.passed:
        raise typer.Exit(1)
