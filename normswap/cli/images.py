"""The options that say how images become inputs, and their folders labels."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from normswap.cli.command import Beside
from normswap.cli.options import DATA, numbers
from normswap.core.errors import NormswapError

if TYPE_CHECKING:
    from normswap.source import Source

_LONGEST_LIST = 2**24  # bytes, of the names of classes


@dataclass(frozen=True)
class Scaling:
    """What images are normalized by."""

    panel: ClassVar[str] = DATA.title

    mean: Annotated[
        str | None,
        "Mean of each channel, subtracted from the images: 0.485,0.456,0.406.",
        Beside("--data", "--test"),
    ] = None
    std: Annotated[
        str | None,
        "Standard deviation of each channel, by which the images are divided.",
        Beside("--data", "--test"),
    ] = None

    def numbers(self) -> tuple[list[float] | None, list[float] | None]:
        return numbers("--mean", self.mean), numbers("--std", self.std)


@dataclass(frozen=True)
class Images(Scaling):
    """How images become inputs, and their folders labels; by default as the library says."""

    crop_pct: Annotated[
        float | None,
        "Share of the resized image that the center crop keeps, such as 0.875; default: the "
        "model's, or 1.",
        Beside("--data", "--test"),
    ] = None
    crop_mode: Annotated[
        str | None,
        "center: keep the aspect ratio; squash: do not; border: add one; default: the model's.",
        Beside("--data", "--test"),
    ] = None
    interpolation: Annotated[
        str | None,
        "Filter that resizes, such as bilinear or bicubic; default: the model's.",
        Beside("--data", "--test"),
    ] = None
    classes: Annotated[
        Path | None,
        "File with the name of the class of each output, one a line, for folders called by them.",
        Beside("--data", "--test"),
    ] = None
    ignore_labels: Annotated[
        bool, "Measure no accuracy: the labels are of other classes.", Beside("--data", "--test")
    ] = False

    def words(self) -> list[str]:
        """The options, but for the mean and the deviation."""
        given = {
            "--crop-pct": self.crop_pct,
            "--crop-mode": self.crop_mode,
            "--interpolation": self.interpolation,
            "--classes": self.classes,
        }
        pairs = [(name, str(value)) for name, value in given.items() if value is not None]
        flags = ["--ignore-labels"] if self.ignore_labels else []
        return [word for pair in pairs for word in pair] + flags

    def of(self, opened: "Source") -> dict[str, Any]:
        """The arguments of `normswap.fit.data.open_named` for this model."""
        from normswap.source.preprocessing import Preprocessing

        mean, std = self.numbers()
        given: dict[str, Any] = {
            "crop_pct": self.crop_pct,
            "crop_mode": self.crop_mode,
            "interpolation": self.interpolation,
        }
        configured = opened.images or Preprocessing()
        return {
            "mean": mean,
            "std": std,
            "preprocessing": replace(
                configured, **{name: value for name, value in given.items() if value is not None}
            ),
            "classes": None if self.classes is None else _lines(self.classes),
            "labelled": not self.ignore_labels,
        }


def _lines(path: Path) -> list[str]:
    """The lines of a text file.

    Raises:
        NormswapError: there is no such file, or it is no text, or too long.
    """
    if not path.is_file() or path.stat().st_size > _LONGEST_LIST:
        raise NormswapError(
            f"--classes takes a text file with one name a line, and {str(path)!r} is none"
        )
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise NormswapError(f"{str(path)!r} is no text in UTF-8; save it as that") from error
