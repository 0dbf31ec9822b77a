"""What advice consists of: the use, suggestions with commands on the model as the user named it,
and sentences that tell the numbers of a model."""

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict
from rich.console import RenderableType
from rich.padding import Padding

from normswap.core.errors import NormswapError
from normswap.core.results import Result
from normswap.core.terminal import Shell, words
from normswap.store import OWN_SOURCES

DATA = "DATA"  # stands where no data were named


@dataclass(frozen=True)
class Given:
    """How the user named the model and the data: the values of the options of that name.

    Attributes:
        weights: further options of the model's weights, as they were typed.
        images: and of the images of the data.
    """

    model: str = "MODEL"
    checkpoint: Path | None = None
    source: str | None = None
    input: Sequence[str] = ()
    data: str | None = None
    mean: str | None = None
    std: str | None = None
    weights: Sequence[str] = ()
    images: Sequence[str] = ()

    def command(self, verb: str, *options: str, data: bool = False) -> str:
        """The command line of `verb` on the model; with `data` on the data as well."""
        words = ["normswap", verb, self.model]
        if self.checkpoint is not None:
            words += ["--checkpoint", str(self.checkpoint)]
        if self.source is not None:
            words += ["--source", self.source]
        words += self.weights
        for shape in self.input:
            words += ["--input", shape]
        if data:
            words += ["--data", self._data, *self.scaling, *self.images]
        return shlex.join([*words, *options])

    @property
    def scaling(self) -> list[str]:
        """--mean and --std, if they were given."""
        pairs = (("--mean", self.mean), ("--std", self.std))
        return [word for name, value in pairs if value is not None for word in (name, value)]

    @property
    def _data(self) -> str:
        demo = self.model if self.model == "demo:digits" else DATA  # it comes with its own
        return self.data or demo

    def written_to(self, folder: str) -> "Given":
        """The model after a command wrote it to `folder`, which holds its weights."""
        data = self._data if self.data or self._data != DATA else None
        source = self.source
        if not Path(self.model).is_dir() and not self.model.startswith(OWN_SOURCES):
            source = self.model  # a folder does not choose the code that opens it
        return replace(self, model=folder, checkpoint=None, weights=(), source=source, data=data)


Urgency = Literal["must", "should", "could"]
UseTarget = Literal["onnxruntime", "cuda", "edge"]
# From here on a batch's statistics are as good as frozen ones (README, docs/batch_size.svg).
ENOUGH = 16
_STYLE = {"must": "bold red", "should": "bold green", "could": "bold"}
_INDENT = 3


class Use(BaseModel):
    """What the model is for.

    Attributes:
        batch_size: of training; None where it is not trained.
        private: trained with differential privacy, where no sample may see the others.
        target: where it is deployed.
    """

    model_config = ConfigDict(frozen=True)

    batch_size: int | None = None
    private: bool = False
    target: UseTarget | None = None

    @classmethod
    def of(cls, batch_size: int | None, private: bool, target: str | None) -> "Use":
        """The use that these words describe.

        Raises:
            NormswapError: there is no such target or batch size.
        """
        if target is not None and target not in get_args(UseTarget):
            known = ", ".join(get_args(UseTarget))
            raise NormswapError(f"unknown target {target!r}; advice is for {known}")
        if batch_size is not None and batch_size < 1:
            raise NormswapError(f"a batch size is 1 or more, not {batch_size}")
        return cls(batch_size=batch_size, private=private, target=target)  # type: ignore[arg-type]

    def options(self) -> list[str]:
        """The use as options of the command line."""
        words = [] if self.batch_size is None else ["--batch-size", str(self.batch_size)]
        words += ["--private"] if self.private else []
        return words + ([] if self.target is None else ["--target", self.target])

    @property
    def trains(self) -> bool:
        return self.batch_size is not None or self.private

    @property
    def leaves_the_batch(self) -> bool:
        """Whether its training is better off without statistics of the batch."""
        return self.private or (self.batch_size is not None and self.batch_size < ENOUGH)


class Suggestion(BaseModel):
    """One thing to do.

    Attributes:
        name: short and unique in the advice.
        urgency: "must": without it the use fails; "should": it pays; "could": a further step, or
            another way.
        what: to do, in one line.
        why: with numbers of this model.
        command: that does it in a shell; empty where only Python can.
        python: the same in Python.
        after: the name of the suggestion whose result the command takes; empty: the model's own.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    urgency: Urgency
    what: str
    why: str
    command: str
    python: str
    after: str = ""


class Advice(Result, BaseModel):
    """Suggestions, the most urgent first.

    It iterates over them; `advice["fold"]` is the one of that name.

    Attributes:
        use: what they are for.
        found: the facts of the model that they rest on.
        suggestions: what to do; none where all is well.
        notes: what is good to know, and asks for no command.
    """

    model_config = ConfigDict(frozen=True)

    use: Use
    found: dict[str, Any]
    suggestions: tuple[Suggestion, ...]
    notes: tuple[str, ...]

    def entries(self) -> tuple[Suggestion, ...]:
        """The suggestions."""
        return self.suggestions

    def summary(self) -> str:
        """How many suggestions there are, and how urgent they are."""
        urgencies = Counter(each.urgency for each in self.suggestions)
        how = ", ".join(f"{number} {urgency}" for urgency, number in urgencies.items())
        return count(len(self), "suggestion") + (f" ({how})" if how else "")

    def tables(self, *, commands: bool = False) -> list[RenderableType]:
        """The suggestions, numbered, each with its reason.

        Args:
            commands: with the command that does it, where there is one, and not the call in Python.
        """
        return _advice_table(self, commands)


def _advice_table(advice: Advice, commands: bool) -> list[RenderableType]:
    parts: list[RenderableType] = []
    numbers = {each.name: number for number, each in enumerate(advice.suggestions, start=1)}
    for each in advice.suggestions:
        after = f", after {numbers[each.after]}" if each.after in numbers else ""
        heading = words(f"{numbers[each.name]}. ")
        heading.append_text(words(each.what, "bold")).append_text(words("  "))
        parts.append(heading.append_text(words(each.urgency + after, _STYLE[each.urgency])))
        indented = (0, 0, 0, _INDENT)
        parts.append(Padding(words(each.why), indented, expand=False))
        if commands and each.command:
            parts.append(Shell(each.command, _INDENT))
        else:
            parts.append(Padding(words(each.python, "cyan"), indented, expand=False))
        parts.append(words(""))
    if not advice.suggestions:
        parts += [words("Nothing to do.", "bold green")]
    parts += [words(note, "dim") for note in advice.notes]
    if commands and any(DATA in shlex.split(each.command) for each in advice.suggestions):
        parts.append(
            words(
                f"{DATA}: an image folder, a zip of one, an .npz with x and y, or module:factory.",
                "dim",
            )
        )
    return parts


def count(number: int, noun: str) -> str:
    """1 BatchNorm, 53 BatchNorms."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def of(part: int, whole: int, noun: str) -> str:
    """all 53 BatchNorms, the one BatchNorm, 44 of 61 BatchNorms."""
    if part == whole:
        return f"the one {noun}" if whole == 1 else f"all {whole} {noun}s"
    return f"{part} of {count(whole, noun)}"


def some(names: Sequence[str], most: int = 3) -> str:
    """a, b, c and 12 more."""
    shown = ", ".join(name or "(the model)" for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def sentences(*parts: str) -> str:
    """Those that are not empty, one after the other."""
    return " ".join(filter(None, parts))
