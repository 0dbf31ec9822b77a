"""What is printed for people: the consoles, and tables and lines for them.

Strings are words here: rich reads no markup (`[bold]`) and no emoji codes (`:smile:`) in them, and
all of them pass `normswap.core.shown`. So nothing else in normswap makes a console, table or text
of rich, which a test holds.
"""

import shlex
from collections.abc import Iterator, Sequence
from io import StringIO
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import Progress, ProgressColumn, Task
from rich.status import Status
from rich.table import Table
from rich.text import Text

from normswap.core.shown import LONGEST, LONGEST_NAME, shell_line, shown


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


class Shell:
    """A command line that can be copied: it is broken between options, with a backslash."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self.lines(options.max_width):
            text = words(line, "cyan", longest=len(line))  # cut, it would be another command
            text.no_wrap, text.overflow = True, "ignore"
            yield text

    def lines(self, width: int) -> list[str]:
        """The command in lines of at most `width` characters, where its words allow that."""
        lines = [""]
        for part in _parts(self.command):
            if lines[-1] and len(lines[-1]) + 1 + len(part) + 2 > width:
                lines[-1] += " \\"
                lines.append("    " + part)
            else:
                lines[-1] = (
                    f"{lines[-1]} {part}".lstrip() if len(lines) == 1 else f"{lines[-1]} {part}"
                )
        return lines


def _parts(command: str) -> Iterator[str]:
    """The words of a command, each option together with its value."""
    part: list[str] = []
    for word in shlex.split(command):
        if part and word.startswith("--"):
            yield shell_line(part)
            part = []
        part.append(word)
    yield shell_line(part)


WHOLE_MODEL = "(model)"  # for the name of a site that is the whole model, ""
_TEXT_WIDTH = 140
# A narrow terminal breaks reasons, between words, before it breaks one of these.
_UNBROKEN = ("site", "input", "method", "keeps")


def table(*columns: str) -> PlainTable:
    """An empty table with these headings."""
    made = PlainTable(header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold", no_wrap=column in _UNBROKEN)
    return made


def facts_table(title: str, facts: Sequence[tuple[str, str]]) -> PlainTable:
    """Names and values, for the result of a command."""
    rows = PlainTable(title=title, title_justify="left", show_header=False)
    rows.add_column(style="bold")
    rows.add_column(overflow="fold")
    for name, value in facts:
        rows.add_row(name, value)
    return rows


def site_name(name: str) -> Text:
    """The name of a site in a table."""
    return words(name or WHOLE_MODEL, longest=LONGEST_NAME)


def to_text(*parts: RenderableType) -> str:
    """`parts` as plain text, for `print`."""
    buffer = StringIO()
    console = PlainConsole(file=buffer, width=_TEXT_WIDTH, color_system=None)
    for part in parts:
        console.print(part)
    return buffer.getvalue().rstrip()


# Displays inside one another must share it (rich >= 14.1).
stderr = PlainConsole(stderr=True)
