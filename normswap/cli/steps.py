"""The steps of a command: open the model, tell what goes on, show what came of it."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from normswap.core.errors import Interrupted, NormswapError, first_line
from normswap.core.shown import LONGEST_NAME, shown
from normswap.core.terminal import PlainConsole, is_quiet, stderr, words

if TYPE_CHECKING:
    from normswap.passes.plan import Plan
    from normswap.report.rewrite import RewriteReport
    from normswap.source import Source


def open_model(
    model: str, checkpoint: Path | None, source: str | None, input: list[str] | None
) -> "Source":
    from normswap.graph.supported import check_supported
    from normswap.passes.recipe import recipe_of, set_source
    from normswap.store import resolve

    opened = resolve(model, checkpoint=checkpoint, input_shapes=input or (), source=source)
    check_supported(opened.model)
    if opened.renamed:
        said = f"checkpoint {checkpoint}: {opened.renamed}"
        stderr.print(said, soft_wrap=True)
    if recipe_of(opened.model).source is None:
        set_source(opened.model, model)
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
    inputs: Any,
    scaling: tuple[Any, Any],
    *,
    samples: int | None = None,
    batch_size: int = 64,
) -> tuple[Any, Any, str]:
    """Data to learn from, data to measure on, and what the latter are; None where none are named.

    Args:
        test: data to measure on; by default a part of `data`.
        inputs, scaling, samples, batch_size: as in `normswap.fit.data.open_split`.
    """
    from normswap.fit.data import open_named, open_split

    training, held_out, measured_on = None, None, ""
    if data is not None:
        training, held_out, measured_on = open_split(data, samples, inputs, *scaling, batch_size)
    if test is not None:
        held_out, measured_on = open_named(test, inputs, *scaling), test
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
    name = Path(model.partition(":")[0]).stem if ".py:" in model else model.rpartition(":")[2]
    return Path("normswap-out") / f"{Path(name).name}-{what}"


def folder_for(out: Path | None, model: str, what: str) -> Path:
    """The folder for the result, by default as `default_out` has it; called before all work.

    Raises:
        NormswapError: the result cannot be written there.
    """
    from normswap.core.atomic import check_writable
    from normswap.report.page import PAGE, REPORT
    from normswap.report.rewrite import ONNX, ONNX_DATA
    from normswap.store import RECIPE, WEIGHTS

    folder = out or default_out(model, what)
    if folder.suffix == ".onnx":
        raise NormswapError(
            f"--out {shown(folder, LONGEST_NAME)} must name a folder here, for the model and its "
            "report; normswap export writes a single file"
        )
    check_writable(folder, (WEIGHTS, RECIPE, REPORT, PAGE, ONNX, ONNX_DATA))
    return folder


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


def show_plan(decided: "Plan", json: bool, whole: bool) -> None:
    show(decided.tables(whole=whole), decided.model_dump(mode="json") if json else None)


def finish(report: "RewriteReport", json: bool, whole: bool) -> None:
    """Show the report; the exit status is 1 if a check did not hold."""
    from normswap.report.page import plain

    parts = [*report.tables(whole=whole), *map(words, _next_steps(report))]
    show(parts, plain(report) if json else None)
    if not report.passed:
        raise typer.Exit(1)
