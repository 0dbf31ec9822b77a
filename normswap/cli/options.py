"""The options that commands share, in groups, and how the text of some is read."""

from collections.abc import Iterable
from dataclasses import dataclass
from json import JSONDecodeError, loads
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from normswap.cli.command import Beside, Panel
from normswap.cli.steps import folder_for, open_model, placed
from normswap.core.errors import NormswapError, told
from normswap.core.shown import LONGEST_NAME, shown
from normswap.core.terminal import quiet

if TYPE_CHECKING:
    from normswap.source import Source

LARGEST = 1e38  # about what a float32 can hold
LARGEST_RATE = 1e6  # far above any that is of use
_MOST_DIGITS = 12
# What counts something is below that: with more, sizes and counters of torch would overflow.
MOST = 2**31 - 1


DATA, TRAINING = Panel("Data"), Panel("Training")
ONNX, OUTPUT = Panel("ONNX"), Panel("Output")


def count(help: str, *, least: int = 1, most: int = MOST) -> Any:
    """An option that takes a whole number from `least` to `most`."""

    def parsed(text: str | int) -> int:  # an int where it is the default
        digits = str(text).lstrip("-")
        found = int(text) if digits.isdecimal() and len(digits) <= len(str(most)) else None
        if found is None or not least <= found <= most:
            raise typer.BadParameter(
                f"{_named(str(text))} is not a whole number from {least} to {most}"
            )
        return found

    return typer.Option(parser=parsed, metavar="N", help=help)


MODEL_HELP = (
    "demo:digits, torchvision:NAME, timm:NAME (with arguments, NAME?num_classes=10), hf:NAME, "
    "package.module:factory, file.py:factory, a folder that normswap saved, or a .pt2"
)
Checkpoint = Annotated[Path | None, "Weights: safetensors, or a state dict of torch.save."]
CheckpointKey = Annotated[
    str | None,
    "Entry of the checkpoint to load, such as state_dict_ema; default: the one that fits.",
    Beside("--checkpoint"),
]
Pretrained = Annotated[
    bool, "Load the pretrained weights of torchvision or timm; without it they are RANDOM."
]
SourceOption = Annotated[
    str | None,
    "Factory (file.py:function) that rebuilds the model of a saved folder; "
    "needed if it is your own code.",
]
Input = Annotated[
    list[str] | None,
    "Shape of an example input, such as 1x3x224x224 or int64:1x128; repeat for several.",
]
DATA_HELP = "demo:digits, an image folder, a zip of one, an .npz with x and y, or module:factory."
DataOption = Annotated[str | None, DATA_HELP, DATA]
DataNeeded = Annotated[str, DATA_HELP, DATA]
Test = Annotated[str | None, "Data to measure accuracy on; default: a part of --data.", DATA]
Samples = Annotated[int, count("Number of samples used for calibration."), DATA, Beside("--data")]
Force = Annotated[bool, "Replace the result that --out holds.", OUTPUT, Beside("--out")]
Seed = Annotated[
    int,
    count(
        "Random seed for the data order and all other randomness.",
        least=-(2**63),
        most=2**64 - 1,
    ),
    TRAINING,
]
Set = Annotated[list[str] | None, "Option of the method, as key=value; repeat for several."]
Device = Annotated[
    str | None,
    "Device to run on: cpu, cuda or mps; default: cpu, and for training an accelerator, "
    "where there is one.",
    Panel("Model"),
]
All = Annotated[bool, "List every site, however many there are.", OUTPUT]
AssumeExample = Annotated[
    bool,
    "Assume that the model is only called like on the example inputs, and rewrite more.",
    Beside("--mode tune"),
]
Opset = Annotated[int | None, count("ONNX opset; default: torch's."), ONNX, Beside("--onnx")]
TargetOption = Annotated[
    str,
    "generic: standard ONNX operators; onnxruntime: those that its CPU provider runs fastest; "
    "tensorrt, coreml, qnn: standard operators that these take.",
    ONNX,
    Beside("--onnx"),
]


@dataclass(frozen=True)
class ModelOptions:
    """Which model, with which weights and example inputs."""

    panel: ClassVar[str] = "Model"

    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
    pretrained: Pretrained = False
    checkpoint: Checkpoint = None
    checkpoint_key: CheckpointKey = None
    source: SourceOption = None
    input: Input = None
    device: Device = None

    def words(self) -> list[str]:
        """The options that say which weights, but for the file."""
        key = [] if self.checkpoint_key is None else ["--checkpoint-key", self.checkpoint_key]
        return ["--pretrained", *key] if self.pretrained else key

    def open(self) -> "Source":
        opened = open_model(
            self.model,
            self.checkpoint,
            self.source,
            self.input,
            pretrained=self.pretrained,
            checkpoint_key=self.checkpoint_key,
        )
        return placed(opened, self.device)


@dataclass(frozen=True)
class Augmentation:
    """How the images that a model learns from are changed."""

    panel: ClassVar[str] = TRAINING.title

    crop: Annotated[
        int,
        count("Random crop: shift each image by up to N pixels, padding with zeros.", least=0),
        Beside("--recover"),
    ] = 0
    flip: Annotated[bool, "Random horizontal flip.", Beside("--recover")] = False

    def shuffled(self, data: Iterable[Any]) -> Iterable[Any]:
        """`data` in a new order each time, and augmented."""
        from normswap.fit.augment import shuffled

        return shuffled(data, crop=self.crop, flip=self.flip)


Comparison = Annotated[
    str | None,
    "How outputs are compared with the original's: kl, bce, mse, cosine or module:function; "
    "default: chosen by their kind.",
    TRAINING,
    Beside("--recover"),
]


@dataclass(frozen=True)
class Computing:
    """How the steps of a training are computed."""

    panel: ClassVar[str] = TRAINING.title

    accumulate: Annotated[int, count("Gradient accumulation: batches per optimizer step.")] = 1
    precision: Annotated[
        str, "float32; bfloat16 or float16: compute in it what torch.autocast considers safe."
    ] = "float32"


@dataclass(frozen=True)
class Saving:
    """The checkpoints of a training."""

    panel: ClassVar[str] = TRAINING.title

    save_every: Annotated[
        int,
        count("Number of steps between two checkpoints in the output folder."),
        Beside("--recover"),
    ] = 100
    resume: Annotated[
        bool, "Continue from the checkpoint in the output folder.", Beside("--recover")
    ] = False


@dataclass(frozen=True)
class Selection:
    """Which normalizations a rewrite is about."""

    include: Annotated[
        list[str] | None, "Glob on the names of normalizations to change; default: all of its kind."
    ] = None
    exclude: Annotated[
        list[str] | None,
        "Glob on the names of normalizations to leave alone.",
    ] = None

    def globs(self) -> dict[str, Any]:
        """The arguments of a pass."""
        return {"include": self.include or None, "exclude": self.exclude or ()}


@dataclass(frozen=True)
class Onnx:
    """Whether the result is exported as well, and for what."""

    panel: ClassVar[str] = ONNX.title

    onnx: Annotated[bool, "Export the result to ONNX as well."] = False
    opset: Opset = None
    target: TargetOption = "generic"


def _folder(text: str) -> Path:
    if not text:  # which would be the folder where the command runs
        raise NormswapError("--out names no folder; give the path of one")
    return Path(text)


Out = Annotated[
    Path | None,
    typer.Option(
        parser=_folder,
        metavar="FOLDER",
        help="Where to write; default: a new folder in normswap-out.",
    ),
    OUTPUT,
]


@dataclass(frozen=True)
class Output:
    """Where the result is written, if it is."""

    panel: ClassVar[str] = OUTPUT.title

    out: Out = None
    force: Force = False
    dry_run: Annotated[bool, "Print the plan, and change and write nothing."] = False
    all: All = False

    def folder(self, model: str, what: str, *, resume: bool = False) -> Path | None:
        """As `folder_for` has it; None for a dry run."""
        if self.dry_run:
            return None
        return folder_for(self.out, model, what, force=self.force, resume=resume)


def _limit_memory(context: typer.Context, size: str | None) -> str | None:
    from normswap.core.memory import limited

    context.with_resource(limited(size))  # until the command ends
    return size


def _be_quiet(context: typer.Context, asked: bool) -> bool:
    context.with_resource(quiet(asked))  # until the command ends
    return asked


Json = Annotated[bool, "Print JSON instead of tables."]
Debug = Annotated[bool, "Show the traceback of an error."]


@dataclass(frozen=True)
class Running:
    """How a command runs and tells what it found."""

    panel: ClassVar[str] = OUTPUT.title

    json: Json = False
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet",
            "-q",
            metavar="",
            callback=_be_quiet,
            help="Print no tables and no progress, only warnings and errors.",
        ),
    ] = False
    memory_limit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            callback=_limit_memory,
            help="Memory that reading a file may take, such as 8GiB; default: 16 times the size of "
            "the file, and at least 1GiB.",
        ),
    ] = None
    debug: Debug = False


def method_options(
    groups: str | None, channels_per_group: int | None, others: list[str] | None
) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if groups is not None:
        named = groups == "auto" or groups.startswith("at most ")
        if not named and (not groups.isdecimal() or len(groups) > _MOST_DIGITS):
            raise NormswapError(
                f"--groups takes a number, auto or 'at most 32', not {_named(groups)}"
            )
        options["groups"] = groups if named else int(groups)
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


def number(option: str, text: str) -> float:
    """One number.

    Raises:
        NormswapError: it is none, or not finite.
    """
    found = numbers(option, text) or []
    if len(found) != 1:
        raise NormswapError(f"{option} takes one number, not {_named(text)}")
    return found[0]


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
