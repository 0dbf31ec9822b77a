"""The commands of the advice, on the model as the user named it."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from normswap.store import OWN_SOURCES

DATA = "DATA"  # stands where no data were named


@dataclass(frozen=True)
class Given:
    """How the user named the model and the data: the values of the options of that name."""

    model: str = "MODEL"
    checkpoint: Path | None = None
    source: str | None = None
    input: Sequence[str] = ()
    data: str | None = None
    mean: str | None = None
    std: str | None = None

    def command(self, verb: str, *options: str, data: bool = False) -> str:
        """The command line of `verb` on the model; with `data` on the data as well."""
        words = ["normswap", verb, self.model]
        if self.checkpoint is not None:
            words += ["--checkpoint", str(self.checkpoint)]
        if self.source is not None:
            words += ["--source", self.source]
        for shape in self.input:
            words += ["--input", shape]
        if data:
            words += ["--data", self._data, *self.scaling]
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
        return replace(self, model=folder, checkpoint=None, source=source, data=data)
