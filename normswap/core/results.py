"""What Python shows of a result: a line as its `repr`, a table for `print`, HTML in a notebook.

A result holds entries, which it iterates over: by their number, or by the name that they are about.
"""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from rich.console import RenderableType

from normswap.core.terminal import to_html, to_text, words

_INTERNAL = frozenset(dir(BaseModel)) - frozenset(dir(object))


class Printed:
    """What is shown so; a base before `pydantic.BaseModel`, where that is one too."""

    def summary(self) -> str:
        """It in a few words."""
        raise NotImplementedError

    def tables(self) -> list[RenderableType]:
        """It whole, for a console of rich."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.summary()}>"

    def __str__(self) -> str:
        return to_text(*self.tables())

    def _repr_html_(self) -> str:
        return to_html(*self.tables())

    def __dir__(self) -> list[str]:
        return sorted(set(super().__dir__()) - _INTERNAL)


class Lines(Printed):
    """What is some lines of text: its `__str__`."""

    def __str__(self) -> str:
        raise NotImplementedError

    def tables(self) -> list[RenderableType]:
        """Its lines."""
        return [words(line, longest=len(line)) for line in str(self).splitlines()]


class Result(Printed):
    """What holds entries as well."""

    def entries(self) -> Sequence[Any]:
        """What it iterates over."""
        raise NotImplementedError

    def find(self, name: str) -> Any:
        """The entry that is about `name`.

        Raises:
            KeyError: there is none.
        """
        for each in self.entries():
            if each.name == name:
                return each
        raise KeyError(name)

    def __iter__(self) -> Any:
        return iter(self.entries())

    def __len__(self) -> int:
        return len(self.entries())

    def __getitem__(self, which: int | slice | str) -> Any:
        return self.find(which) if isinstance(which, str) else self.entries()[which]
