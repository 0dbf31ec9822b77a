"""The steps of a command: open the model, tell what goes on, show what came of it."""

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from normswap.core.errors import Interrupted, NormswapError, first_line
from normswap.core.shown import LONGEST_NAME, shown
from normswap.core.terminal import PlainConsole, facts_table, is_quiet, stderr, words

if TYPE_CHECKING:
    from normswap.passes.plan import Plan
    from normswap.report.rewrite import RewriteReport
    from normswap.source import Source


def open_model(
    model: str,
    checkpoint: Path | None,
    source: str | None,
    input: list[str] | None,
    *,
    pretrained: bool = False,
    checkpoint_key: str | None = None,
) -> "Source":
    from normswap.graph.supported import check_supported
    from normswap.passes.recipe import recipe_of, set_source, set_weights
    from normswap.store import resolve

    opened = resolve(
        model,
        checkpoint=checkpoint,
        checkpoint_key=checkpoint_key,
        pretrained=pretrained,
        input_shapes=input or (),
        source=source,
    )
    check_supported(opened.model)
    if opened.renamed:
        said = f"checkpoint {checkpoint}: {opened.renamed}"
        stderr.print(said, soft_wrap=True)
    if recipe_of(opened.model).source is None:
        set_source(opened.model, model)
    if opened.weights:
        set_weights(opened.model, opened.weights)
    return opened


def loss_named(loss: str | None) -> Any:
    """The loss that `recover` takes: a name, or the function of the user's own that it names.

    Raises:
        NormswapError: it is neither.
    """
    from normswap.fit.outputs import check_loss
    from normswap.source.factory import function_named, is_factory

    if loss is not None and is_factory(loss):
        return function_named(loss)
    check_loss(loss)
    return loss


def open_data(
    data: str | None,
    test: str | None,
    opened: "Source",
    images: dict[str, Any],
    *,
    samples: int | None = None,
    batch_size: int = 64,
) -> tuple[Any, Any, str]:
    """Data to learn from, data to measure on, and what the latter are; None where none are named.

    Args:
        test: data to measure on; by default a part of `data`.
        opened: the model, whose example inputs say which shape the data have.
        images: how they are prepared, as `normswap.cli.images.Images.of` says.
        samples, batch_size: as in `normswap.fit.data.open_split`.
    """
    from normswap.fit.data import open_named, open_split

    training, held_out, measured_on = None, None, ""
    if data is not None:
        training, held_out, measured_on = open_split(
            data, samples, opened.inputs, batch_size=batch_size, **images
        )
    if test is not None:
        held_out, measured_on = open_named(test, opened.inputs, **images), test
    return training, held_out, measured_on


def check(model: Any, inputs: Any) -> None:
    from normswap.graph.running import check_runs

    if inputs is not None:
        check_runs(model, inputs)


def placed(opened: "Source", device: str | None) -> "Source":
    """The model and its example inputs on the device named; where they are, if none is."""
    from torch import Tensor

    from normswap.core.compat import pytree

    if device is None:
        return opened
    place(device, opened.model)
    inputs = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), opened.inputs)
    return replace(opened, inputs=inputs)


def place(device: str | None, *models: Any) -> None:
    """Move models to the device named, or to the accelerator of this machine, if it has one.

    Raises:
        NormswapError: there is no such device.
    """
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    where = found if device is None else device
    try:
        torch.ones(1, device=where).cpu()  # some exist and hold no numbers
        for model in models:
            model.to(where)
    except Exception as error:  # each of torch's devices has its own
        raise NormswapError(
            f"cannot use --device {shown(where, LONGEST_NAME)}: {first_line(error)}; name "
            "another, or none"
        ) from error


def seed_all(seed: int) -> None:
    """Seed every generator that the data and the training may draw from."""
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def going_on() -> Iterator[None]:
    """Ctrl-C in a run, whose message says how to go on with it, is told as that."""
    from normswap.core.interrupts import StopRequested

    try:
        yield
    except StopRequested as error:
        raise Interrupted(str(error)) from error


def needed(inputs: Any) -> Any:
    if inputs is None:
        raise NormswapError(
            "this needs example inputs; give the shape of one with --input, such as 1x3x224x224"
        )
    return inputs


def default_out(model: str, what: str) -> Path:
    """A folder for the result, named after the model and what was done to it."""
    plain = model.partition("?")[0]
    name = Path(plain.partition(":")[0]).stem if ".py:" in plain else plain.rpartition(":")[2]
    return Path("normswap-out") / f"{Path(name).name}-{what}"


def folder_for(
    out: Path | None,
    model: str,
    what: str,
    *,
    force: bool = False,
    resume: bool = False,
) -> Path:
    """The folder for the result; called before all work.

    By default it is as `default_out` has it, with a number where that holds a result already, or to
    `resume` the last of them that was begun.

    Raises:
        NormswapError: the result cannot be written there, or `out` holds one and `force` is false.
    """
    from normswap.core.atomic import check_writable
    from normswap.report.page import PAGE, REPORT
    from normswap.report.rewrite import ONNX, ONNX_DATA
    from normswap.store import RECIPE, WEIGHTS

    if out is not None and out.suffix == ".onnx":
        raise NormswapError(
            f"--out {shown(out, LONGEST_NAME)} must name a folder here, for the model and its "
            "report; normswap export writes a single file"
        )
    results = (WEIGHTS, RECIPE, REPORT, PAGE, ONNX, ONNX_DATA)

    def there(folder: Path) -> list[str]:
        return [name for name in results if (folder / name).exists()]

    folder = out or _free(default_out(model, what), there, resume=resume)
    check_writable(folder, results)
    if out is not None and there(out) and not force and not resume:
        raise NormswapError(
            f"{shown(out, LONGEST_NAME)!r} holds a result already ({', '.join(there(out))}); name "
            "another --out, or replace it with --force"
        )
    return folder


def folder_in_place(
    out: Path | None, model: str, *, force: bool = False, resume: bool = False
) -> Path:
    """As `folder_for`, but by default the folder `model` itself, whose model is then another.

    Raises:
        NormswapError: as `folder_for`.
    """
    same = out is None or out.resolve() == Path(model).resolve()
    return folder_for(out or Path(model), model, "", force=force or same, resume=resume)


def _free(first: Path, there: Callable[[Path], list[str]], *, resume: bool) -> Path:
    """`first`, or with a number the first after it that holds nothing."""
    from normswap.fit.checkpoints import FILE

    folders = [first]
    while there(folders[-1]):
        folders.append(first.with_name(f"{first.name}-{len(folders) + 1}"))
    begun = [folder for folder in folders if (folder / FILE).exists()]
    return begun[-1] if resume and begun else folders[-1]


def command() -> str:
    """What was typed, for a shell to read."""
    return shlex.join(["normswap", *sys.argv[1:]])


def show(parts: list[Any], plain: Any) -> None:
    """Print `parts`, unless --quiet, or where JSON is asked for what is `plain`."""
    if plain is None:
        if is_quiet():
            return
        console = PlainConsole()
        for part in parts:
            console.print(part)
    else:
        from json import dumps

        print(dumps(plain, indent=2))


def _next_steps(report: "RewriteReport") -> list[str]:
    """The command that goes on with the folder that was written."""
    from normswap.report.advice.suggestion import Given

    if not report.files or report.export is not None:
        return []
    written = Given(report.model).written_to(str(Path(report.files[0]).parent))
    return ["", f"next: {written.command('export')}"]


def show_of(opened: "Source", parts: list[Any], plain: dict[str, Any] | None) -> None:
    """`show`, and first where the weights of the model are from."""
    facts = _weights(opened)
    above = [facts_table("", facts)] if facts else []
    show([*above, *parts], plain and {**plain, "weights": opened.weights})


def show_plan(decided: "Plan", opened: "Source", json: bool, whole: bool) -> None:
    """`show_of` a plan, of which the JSON is what `Plan.from_json` reads, and nothing beside it."""
    if not json:
        show_of(opened, decided.tables(whole=whole), None)
        return
    for name, told in _weights(opened):
        stderr.print(f"normswap: {name}: {told}", soft_wrap=True)
    show([], decided.model_dump(mode="json"))


def _weights(opened: "Source") -> list[tuple[str, str]]:
    from normswap.source.source import weights_facts

    return weights_facts({"": opened.weights})


def finish(report: "RewriteReport", json: bool, whole: bool, *, instead_of: str = "") -> None:
    """Show the report; the exit status is 1 if a check did not hold.

    Args:
        instead_of: the folder of the model that came in, which the result may have replaced.
    """
    from normswap.report.page import plain

    parts = [*report.tables(whole=whole), *map(words, _next_steps(report))]
    show(parts, plain(report) if json else None)
    where = Path(report.files[0]).parent
    if instead_of and not is_quiet() and where.resolve() == Path(instead_of).resolve():
        said = f"the result took the place of the model in {instead_of}; --out names another folder"
        stderr.print(f"normswap: {said}", soft_wrap=True)
    if not report.passed:
        raise typer.Exit(1)
