"""The typer app: its name, --version, and the commands in the order in which --help lists them.

Each command imports what it needs itself, so that --help is fast.
"""

from collections.abc import Callable
from typing import Annotated

import typer

from normswap import __version__
from normswap.cli.command import Command, help_of, with_groups
from normswap.cli.conversion import convert
from normswap.cli.deployment import compare, export, validate
from normswap.cli.learning import calibrate, finetune, recover
from normswap.cli.looking import advise, inspect, methods
from normswap.cli.rewrites import (
    absorb_input,
    bake,
    center,
    fold,
    fold_gains,
    freeze,
    parametrize,
    rescale,
    rotate,
)

EXAMPLES = """\
Begin with what a model has, and what to do about it:

normswap inspect demo:digits

normswap advise demo:digits --batch-size 4
"""

app = typer.Typer(
    name="normswap",
    help="Rewrite the normalization of PyTorch models: replace, fold, freeze, and ship to ONNX.",
    epilog=EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[
        bool, typer.Option("--version", metavar="", help="Print the version and stop.")
    ] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


COMMANDS: dict[str, tuple[Callable[..., None], ...]] = {
    "Look at models": (inspect, advise, compare, methods),
    "Replace normalizations, and train": (convert, calibrate, recover, finetune),
    "Rewrite without changing the function": (
        fold,
        fold_gains,
        center,
        rotate,
        rescale,
        absorb_input,
        freeze,
        parametrize,
        bake,
    ),
    "Deploy": (export, validate),
}
for panel, commands in COMMANDS.items():
    for command in commands:
        words, examples = help_of(command)
        made = app.command(cls=Command, help=words, epilog=examples, rich_help_panel=panel)
        made(with_groups(command))
