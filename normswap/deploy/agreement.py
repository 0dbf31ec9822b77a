"""How far a file in fewer bits agrees with its model on data, by what the outputs are.

- of classes (logits, log-probabilities, probabilities): the share of samples and positions for
  which both choose the same class;
- of all others: the relative squared error mean((s - t)^2 / v), with v the variance of each channel
  of the model's output t over the data.

What has to hold (`LEAST_ALIKE`, `MOST_ERROR`) tells a file that has lost its function from one that
has lost some digits. int8 costs a classifier of whose weights each output channel has its scale
0 to 3 % of accuracy (Krishnamoorthi 2018, arXiv 1806.08342, table 4), and it changes some more
predictions than it makes wrong; an error of a tenth of the variance leaves a correlation of 0.95.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from normswap.fit.outputs import Part, parts_of, tensors_in

LEAST_ALIKE = 0.9
MOST_ERROR = 0.1
_CLASSES = {"logits", "log-probabilities", "probabilities"}


class Agreement(BaseModel):
    """How far one output of a file agrees with the model's.

    Attributes:
        output: where it is in what the model returns; empty where it is all of that.
        share: of the samples and positions that have the same class; None without classes.
        error: the relative squared error; None with classes.
        samples: how many were compared.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    output: str
    share: float | None = None
    error: float | None = None
    samples: int

    @property
    def passed(self) -> bool:
        """Whether the file still has its function there."""
        if self.share is not None:
            return self.share >= LEAST_ALIKE
        return self.error is not None and self.error <= MOST_ERROR

    def __str__(self) -> str:
        where = f"{self.output!r}: " if self.output else ""
        if self.share is not None:
            found = f"same class for {self.share:.2%}"
            return f"{where}{found} of {self.samples} samples (at least {LEAST_ALIKE:.0%})"
        found = f"relative squared error {self.error:.2e}"
        return f"{where}{found} over {self.samples} samples (at most {MOST_ERROR:g})"


@dataclass
class _Sum:
    part: Part
    value: float = 0.0
    samples: int = 0


class Agreements:
    """Gathers, batch by batch, how far outputs agree.

    Args:
        model: on the CPU, in eval mode.
        batches: the first few of the data, which tell what each output is.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any]) -> None:
        parts = parts_of(model, model, batches, None)
        if any(part.kind not in (*_CLASSES, "values") for part in parts):
            values = {part.name: part for part in parts_of(model, model, batches, None, "mse")}
            parts = tuple(p if p.kind in _CLASSES else values[p.name] for p in parts)
        self._sums = [_Sum(part) for part in parts]

    def add(self, actual: Any, expected: Any, samples: int) -> None:
        """Take a batch in: what the file and what the model return, nested alike."""
        given, told = tensors_in(actual), tensors_in(expected)
        for each in self._sums:
            each.value += samples * _apart(each.part, given[each.part.name], told[each.part.name])
            each.samples += samples

    def found(self) -> tuple[Agreement, ...]:
        """What was gathered, for each output of floating point."""
        return tuple(
            Agreement(
                output=each.part.name,
                samples=each.samples,
                **{_measure(each.part): each.value / each.samples},
            )
            for each in self._sums
        )


def _measure(part: Part) -> str:
    return "share" if part.kind in _CLASSES else "error"


def _apart(part: Part, actual: Tensor, expected: Tensor) -> float:
    if part.kind in _CLASSES:
        same = actual.argmax(part.axis) == expected.argmax(part.axis)
        return float(same.double().mean())
    return float(part.apart(actual, expected))
