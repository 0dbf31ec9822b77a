"""The options that commands share, and how the text of some is read.

An option that says something only beside another is refused without that, not ignored.
"""

from json import JSONDecodeError, loads
from math import nan
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand

from normswap.core.errors import NormswapError, told
from normswap.core.shown import LONGEST_NAME, shown


class Beside:
    """In the annotation of an option: what it says, it says of one of `others`.

    Each is written as on the command line, "--data", or with its value, "--precision int8". In a
    command that has none of them the option says something by itself.

    Args:
        value: the only value of the option that needs them; by default every value does.
    """

    def __init__(self, *others: str, value: str | None = None) -> None:
        self.others, self.value = others, value


class Command(TyperCommand):
    """A command that refuses an option which it would otherwise ignore."""

    def invoke(self, ctx: Any) -> Any:
        """Carry the command out, if every option that was typed says something."""
        for name, hint in get_type_hints(self.callback, include_extras=True).items():
            for each in getattr(hint, "__metadata__", ()):
                if isinstance(each, Beside) and _asked(ctx, name, each.value):
                    _check(name, each, ctx.params)
        return super().invoke(ctx)


def _asked(ctx: Any, name: str, value: str | None) -> bool:
    """Whether the command line gives the option, be it with its default; 0 asks for nothing."""
    typed = ctx.get_parameter_source(name).name == "COMMANDLINE"
    given = ctx.params[name]
    return bool(typed and given and value in (None, given))


def _check(name: str, beside: Beside, values: dict[str, Any]) -> None:
    needed = [each for each in beside.others if _name(each) in values]
    if needed and not any(_holds(each, values) for each in needed):
        flag = f"--{name.replace('_', '-')}"
        said = flag if beside.value is None else f"{flag} {beside.value}"
        raise NormswapError(
            f"{said} says nothing without {' or '.join(needed)}; add that, or leave {said} out"
        )


def _holds(other: str, values: dict[str, Any]) -> bool:
    value, (_, _, wanted) = values[_name(other)], other.partition(" ")
    return bool(value == wanted if wanted else value)


def _name(other: str) -> str:
    return other.partition(" ")[0].removeprefix("--").replace("-", "_")


LARGEST = 1e38  # about what a float32 can hold
LARGEST_RATE = 1e6  # far above any that is of use
_MOST_DIGITS = 12


def _folder(text: str) -> Path:
    if not text:  # which would be the folder where the command runs
        raise NormswapError("--out names no folder; give the path of one")
    return Path(text)


def _limit_memory(context: typer.Context, size: str | None) -> str | None:
    from normswap.core.memory import limited

    context.with_resource(limited(size))  # until the command ends
    return size


MODEL_HELP = (
    "demo:digits, torchvision:NAME, timm:NAME, hf:NAME, package.module:factory, file.py:factory, "
    "a folder that normswap saved, or a .pt2"
)
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Checkpoint = Annotated[
    Path | None, typer.Option(help="Weights: safetensors, or a state dict of torch.save.")
]
SourceOption = Annotated[
    str | None,
    typer.Option(
        "--source",
        help="Factory (file.py:function) that rebuilds the model of a saved folder; "
        "needed if it is your own code.",
    ),
]
Input = Annotated[
    list[str] | None,
    typer.Option("--input", help="Shape of an example input, 1x3x224x224; repeat for several."),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        help="demo:digits, an image folder, a zip of one, an .npz with x and y, module:factory."
    ),
]
# What counts something is below that: with more, sizes and counters of torch would overflow.
MOST = 2**31 - 1
Samples = Annotated[
    int,
    typer.Option(min=1, max=MOST, help="Number of samples used for calibration."),
    Beside("--data"),
]
BatchSize = Annotated[
    int, typer.Option(min=1, max=MOST, help="Samples in a batch; with several processes, of each.")
]
Steps = Annotated[int, typer.Option(min=1, max=MOST, help="How many steps of the optimizer.")]
Crop = Annotated[
    int,
    typer.Option(
        min=0, max=MOST, help="Random crop: shift each image by up to N pixels, padding with zeros."
    ),
    Beside("--recover"),
]
Flip = Annotated[bool, typer.Option("--flip", help="Random horizontal flip."), Beside("--recover")]
Accumulate = Annotated[
    int, typer.Option(min=1, max=MOST, help="Gradient accumulation: batches per optimizer step.")
]
PrecisionOption = Annotated[str, typer.Option("--precision", help="no, bf16 or fp16.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, mps; default: an accelerator where there is one.")
]
SaveEvery = Annotated[
    int,
    typer.Option(min=1, max=MOST, help="Steps between two checkpoints in the output folder."),
    Beside("--recover"),
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Go on from the checkpoint in the output folder."),
    Beside("--recover"),
]
Seed = Annotated[
    int,
    typer.Option(
        min=-(2**63), max=2**64 - 1, help="Random seed for the data order and all other randomness."
    ),
]
Mean = Annotated[
    str | None,
    typer.Option(help="Subtracted from each channel of the images: 0.485,0.456,0.406."),
    Beside("--data", "--test"),
]
Std = Annotated[
    str | None,
    typer.Option(help="Divides each channel of the images."),
    Beside("--data", "--test"),
]
Include = Annotated[
    list[str] | None,
    typer.Option(help="Glob on names of normalizations to change; default: all of its kind."),
]
Exclude = Annotated[
    list[str] | None, typer.Option(help="Glob on the names of normalizations to leave alone.")
]
Set = Annotated[list[str] | None, typer.Option("--set", help="An option of the method: key=value.")]
Out = Annotated[
    Path | None, typer.Option(parser=_folder, metavar="DIRECTORY", help="Where to write.")
]
AssumeExample = Annotated[
    bool,
    typer.Option(
        "--assume-example",
        help="The model is only called as with the example inputs; rewrite what these show.",
    ),
    Beside("--mode tune"),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
MemoryLimit = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        callback=_limit_memory,
        help="Memory that a file may ask for, as 8GiB; default: 16 times its size, at least 1GiB.",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Opset = Annotated[
    int | None,
    typer.Option(min=1, max=MOST, help="ONNX opset; default: torch's."),
    Beside("--onnx"),
]
TargetOption = Annotated[
    str,
    typer.Option(help="generic: standard operators; onnxruntime: the fastest on its CPU."),
    Beside("--onnx"),
]


def method_options(
    groups: str | None, channels_per_group: int | None, others: list[str] | None
) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if groups is not None:
        if groups != "auto" and (not groups.isdecimal() or len(groups) > _MOST_DIGITS):
            raise NormswapError(f"--groups takes a number or auto, not {_named(groups)}")
        options["groups"] = groups if groups == "auto" else int(groups)
    if channels_per_group is not None:
        options["channels_per_group"] = channels_per_group
    for text in others or []:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise NormswapError(f"--set takes key=value, not {_named(text)}; as in --set eps=1e-6")
        if key in options:
            raise NormswapError(f"{key} is given twice; give it once")
        try:
            options[key] = loads(value.lower() if value in ("True", "False") else value)
        except JSONDecodeError:
            options[key] = value
        except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
            raise NormswapError(
                f"--set {key} cannot take {_named(value)}: {told(error)}"
            ) from error
    return options


def numbers(option: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        found = [float(number) for number in text.split(",")]
    except ValueError:
        found = [nan]
    least = 1 / LARGEST if option == "--std" else -LARGEST  # which divides
    if not all(least < number < LARGEST for number in found):
        raise NormswapError(f"{option} takes numbers such as 0.485,0.456,0.406, not {_named(text)}")
    return found


def check_number(option: str, number: float | None, *, zero: bool = False) -> None:
    """Check a rate, a norm or a tolerance.

    Args:
        zero: whether it may be 0.

    Raises:
        NormswapError: it is not above 0, too large, or NaN.
    """
    if number is not None and not (0 < number <= LARGEST_RATE or (zero and number == 0)):
        least = "0 or more" if zero else "above 0"
        raise NormswapError(f"{option} {number:g} must be {least} and at most {LARGEST_RATE:g}")


def _named(text: str) -> str:
    return repr(shown(text, LONGEST_NAME))
