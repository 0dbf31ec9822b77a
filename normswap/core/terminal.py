"""What is printed for people: the consoles, and tables and lines for them.

Strings are words here: rich reads no markup (`[bold]`) and no emoji codes (`:smile:`) in them, and
all of them pass `normswap.core.shown`. So nothing else in normswap makes a console, table or text
of rich, which a test holds.
"""

from typing import Any

from rich.console import Console, RenderableType
from rich.progress import Progress, ProgressColumn, Task
from rich.status import Status
from rich.table import Table
from rich.text import Text

from normswap.core.shown import LONGEST, shown


class PlainConsole(Console):
    """A console to which a string is words alone; a line break in what is printed stays one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """`text` as it stands; rich calls this for every string that it is given."""
        wanted = ("style", "justify", "overflow")
        taken = {name: options[name] for name in wanted if name in options}
        return Text("\n".join(map(shown, text.split("\n"))), **taken)

    def status(self, status: RenderableType, **options: Any) -> Status:
        """A spinner beside `status`; of a string rich would read the markup here."""
        return super().status(words(status) if isinstance(status, str) else status, **options)


class PlainTable(Table):
    """A table without rules, in which a string is one line until it is wrapped."""

    def __init__(self, **options: Any) -> None:
        super().__init__(box=None, pad_edge=False, **options)

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """One more row."""
        super().add_row(*(words(c) if isinstance(c, str) else c for c in cells), **options)


class Words(ProgressColumn):
    """A column of a progress display: a format string over its task."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self._form = form

    def render(self, task: Task) -> Text:
        return words(self._form.format(task=task))


def words(text: str, style: str = "", *, longest: int = LONGEST) -> Text:
    """`text` as one line for a console."""
    return Text(shown(text, longest), style)


def progress(*columns: ProgressColumn, quiet: bool) -> Progress:
    """A display on a terminal's stderr that goes away at its end; nothing where that is a file."""
    return Progress(
        *columns, console=stderr, transient=True, disable=quiet or not stderr.is_terminal
    )


# Displays inside one another must share it (rich >= 14.1).
stderr = PlainConsole(stderr=True)
