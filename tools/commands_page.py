"""Write docs/cli.md from the command line itself: every command with its arguments and options.

    python tools/commands_page.py [--check]

With --check nothing is written; the exit status is 1 if the page is another.
"""

import sys
from pathlib import Path
from typing import Any

import typer

from normswap.cli.app import app

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
INTRO = """\
# Commands

Written by `python tools/commands_page.py` from the commands themselves; `normswap COMMAND --help`
says the same.

A MODEL is `demo:digits`, `torchvision:NAME`, `timm:NAME`, `hf:NAME`, `package.module:factory`,
`file.py:factory` (a function without arguments that returns the module, or the module and example
inputs), a folder that normswap wrote, or a `.pt2`. Those of torchvision and timm have RANDOM
weights, which every summary says: `--pretrained` loads the library's, and `timm:resnet18.a1_in1k`
or `torchvision:resnet50.IMAGENET1K_V1` names which. `--checkpoint` loads yours: safetensors, or a
state dict of `torch.save`, read without running code. A prefix that all its names have is left out,
and named. Arguments of the library's builder stand behind the name, in quotes for the shell:
`'timm:resnet18?num_classes=10'`.

`--data` is an image folder, a zip of one, an `.npz` with `x` and `y`, or `module:factory` of a
DataLoader. Images are resized, cropped and normalized as the configuration of the model says, in
timm, torchvision's weights or transformers' image processor, and the summary shows how; for other
models they are resized so that they cover the input, cropped at the center, and normalized as for
ImageNet. Options say otherwise. A class folder has as its label its number, where all are called by
numbers, its line in the file `--classes`, or its place in alphabetical order, if there are as many
as the model has outputs. A part of the data is held out to measure accuracy on, the same in every
command, or `--test` names other data.

Results go to `--out`, by default to a new folder in `normswap-out/`. An `--out` that holds a result
is refused without `--force`. `calibrate` and `recover` go on with the folder that they are given,
unless `--out` names another.

Exit status 0: done. 1: done, but a check did not hold. 2: wrong usage or input, and one line says
what and what to do. 130: interrupted.
"""


def page() -> str:
    """The whole file."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return "\n".join([INTRO, *(section(name, command) for name, command in commands.items())])


def section(name: str, command: Any) -> str:
    """One command."""
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [each for each in command.params if each.param_type_name == "option"]
    given = [(each.metavar or each.name).upper() for each in arguments]
    rows = [f"| `{_spelling(each)}` | {_words(each)} |" for each in options]
    text = [
        f"## {name}\n",
        f"`{' '.join(['normswap', name, *given])} [OPTIONS]`\n",
        command.help.strip() + "\n",
        *_examples(command.epilog or ""),
    ]
    return "\n".join([*text, "| Option | |", "| --- | --- |", *rows, ""])


def _examples(epilog: str) -> list[str]:
    _, *lines = epilog.split("\n\n")
    return ["\n".join(("```sh", *lines, "```\n"))] if lines else []


def _spelling(option: Any) -> str:
    name = ", ".join(option.opts)
    if option.is_flag:
        return name
    return f"{name} {(option.metavar or option.name).upper()}"


def _words(option: Any) -> str:
    words = (option.help or "").replace("|", r"\|").replace("*", r"\*")
    if option.required:
        return f"{words} Required."
    if option.is_flag or option.default in (None, (), []):
        return words
    return f"{words} Default: {option.default}."


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(PAGE.read_text() != page())
    elif sys.argv[1:]:
        sys.exit(__doc__)
    PAGE.write_text(page())
