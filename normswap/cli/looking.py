"""The commands that only look: at a model, and at the methods there are."""

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType

from normswap.cli.command import Beside
from normswap.cli.images import Images
from normswap.cli.options import All, DataOption, Debug, Json, ModelOptions, Running, count
from normswap.cli.steps import open_data, show, show_of
from normswap.core.errors import NormswapError, warn
from normswap.core.terminal import PlainTable, table, words, working

if TYPE_CHECKING:
    from normswap.norms.registry import Method

METHOD_FACTS = (
    "kind", "keeps", "summary", "formula", "source", "statistics", "batch_independent", "cost",
    "onnx", "options", "swap", "needs_running", "folds_scale",
)  # fmt: skip


def inspect(*, model: ModelOptions, all: All = False, running: Running) -> None:
    """List the normalizations of a model, and what a fold could do with each.

    Examples:
        normswap inspect demo:digits
        normswap inspect timm:resnet18 --all
    """
    from normswap.passes.inspection import inspect as look
    from normswap.report.advice.suggestion import Given

    with working("inspecting"):
        opened = model.open()
        inspection = look(opened.model, opened.inputs)
    following = Given(
        model.model, model.checkpoint, model.source, model.input or (), weights=model.words()
    )
    parts = [*inspection.tables(whole=all), words("")]
    parts.append(words(f"next: {following.command('advise')}"))
    show_of(opened, parts, inspection.to_dict() if running.json else None)


def advise(
    *,
    batch_size: Annotated[int | None, count("Batch size you plan to train with.")] = None,
    private: Annotated[bool, "You plan to train with differential privacy."] = False,
    target: Annotated[
        str | None, "Where you plan to run the model: onnxruntime, cuda or edge."
    ] = None,
    model: ModelOptions,
    data: DataOption = None,
    test: Annotated[
        str | None, "Data to measure accuracy on; default: a part of --data.", Beside("--data")
    ] = None,
    images: Images,
    running: Running,
) -> None:
    """Suggest what to do with a model's normalization, and why, each with the command that does it.

    With --data it runs the model on some samples, to see whether the running statistics fit them
    and what a swap costs.

    Examples:
        normswap advise demo:digits --data demo:digits --batch-size 4
        normswap advise torchvision:mobilenet_v2 --target edge
    """
    from normswap.report.advice.advise import advised
    from normswap.report.advice.suggestion import Given, Use

    use = Use.of(batch_size, private, target)
    named = model.model, model.checkpoint, model.source, model.input or ()
    given = Given(*named, data, images.mean, images.std, model.words(), images.words())
    with working("looking at the model"):
        opened = model.open()
        read = open_data(data, test, opened, images.of(opened))
        advice = advised(opened.model, opened.inputs, use, given, *read)
    told = advice.model_dump(mode="json") if running.json else None
    show_of(opened, advice.tables(commands=True), told)


def methods(
    invariances: Annotated[
        bool, "Show which changes of weights and inputs each method is invariant to."
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List the methods, what a conversion to each keeps, and their options; --json has more facts.

    Examples:
        normswap methods
        normswap methods --invariances
    """
    from normswap.norms.registry import methods as known

    found = known()
    if invariances:
        from normswap.norms.invariances import invariances as compute

        stays, failed = {}, list[NormswapError]()
        # What a package prints is not in the result.
        with working("computing"), redirect_stdout(sys.stderr):
            for name, method in found.items():
                try:
                    stays[name] = compute(method)
                except NormswapError as error:
                    failed.append(error)
        show([_invariances_table(stays)], stays if json else None)
        for each in failed:
            warn(f"{each}; it is left out", stacklevel=2)
        if failed:
            raise typer.Exit(1)
        return
    plain = {
        name: {fact: getattr(method, fact) for fact in METHOD_FACTS}
        for name, method in found.items()
    }
    show(_methods_tables(found), plain if json else None)


def _methods_tables(methods: Mapping[str, "Method"]) -> list[RenderableType]:
    """For each kind, one row for each method."""
    parts: list[RenderableType] = []
    for kind in dict.fromkeys(method.kind for method in methods.values()):
        rows = table("method", "keeps", "what it is", "options")
        for name, method in methods.items():
            if method.kind == kind:
                rows.add_row(name, method.keeps, method.summary, ", ".join(method.options))
        parts += [words(f"{kind} methods", "bold"), rows, words("")]
    return parts[:-1]


def _invariances_table(found: Mapping[str, Mapping[str, bool]]) -> PlainTable:
    """One row for each method, one column for each change that it may not see."""
    columns = next(iter(found.values()), {})
    rows = table("method")
    for column in columns:
        heading = _in_few_letters(column)
        rows.add_column(heading, min_width=max(map(len, heading.split())))
    for name, stays in found.items():
        cells = {True: words("yes", "green"), False: words("no")}
        rows.add_row(name, *(cells[stays[column]] for column in columns))
    return rows


def _in_few_letters(change: str) -> str:
    short = {"re-scaling": "scaled", "re-centering": "shifted", "dataset": "data", "training": ""}
    return " ".join(short.get(word, word) for word in change.split())
