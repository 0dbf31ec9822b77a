"""The typer app: its name, --version, and the commands in the order in which --help lists them.

Each command imports what it needs itself, so that --help is fast.
"""

from typing import Annotated

import typer

from normswap import __version__
from normswap.cli.command import Command, with_groups
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


for command in (
    inspect,
    advise,
    convert,
    fold,
    fold_gains,
    center,
    rotate,
    rescale,
    absorb_input,
    freeze,
    parametrize,
    bake,
    calibrate,
    recover,
    finetune,
    export,
    validate,
    compare,
    methods,
):
    app.command(cls=Command)(with_groups(command))
