"""What is printed for people: the consoles, and tables and lines for them.

Strings are words here: rich reads no markup (`[bold]`) and no emoji codes (`:smile:`) in them, and
all of them pass `normswap.core.shown`. So nothing else in normswap makes a console, table or text
of rich, which a test holds.
"""

import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from io import StringIO
from typing import Any, cast

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.progress import Progress, ProgressColumn, Task
from rich.segment import Segment
from rich.status import Status
from rich.table import Table
from rich.text import Text

from normswap.core.grouping import MOST_ROWS, grouped
from normswap.core.shown import LONGEST, LONGEST_NAME, shell_line, shown

_PIPE_WIDTH = 10_000  # so that a line of a table is a line for grep


class PlainConsole(Console):
    """A console to which a string is words alone; a line break in what is printed stays one.

    A file or a pipe has no width, unless COLUMNS says one.
    """

    def __init__(self, **options: Any) -> None:
        if "file" in options:  # in a notebook rich would show it as well
            options["force_jupyter"] = False
        super().__init__(markup=False, emoji=False, highlight=False, **options)
        if "width" not in options and "COLUMNS" not in os.environ and not self.is_terminal:
            self.width = _PIPE_WIDTH

    def render_str(self, text: str, **options: Any) -> Text:
        """`text` as it stands; rich calls this for every string that it is given."""
        wanted = ("style", "justify", "overflow")
        taken = {name: options[name] for name in wanted if name in options}
        return Text("\n".join(map(shown, text.split("\n"))), **taken)

    def status(self, status: RenderableType, **options: Any) -> Status:
        """A spinner beside `status`; of a string rich would read the markup here."""
        return super().status(words(status) if isinstance(status, str) else status, **options)


class PlainTable(Table):
    """A table without rules, in which a string is one line until it is wrapped, between words.

    Where the longest words of its columns do not fit beside each other, each row has its first cell
    on a line and the others on the next ones.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(box=None, pad_edge=False, **options)

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """One more row."""
        super().add_row(*(words(c) if isinstance(c, str) else c for c in cells), **options)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = self._widths(console, options)
        if widths is None:
            yield from self._stacked()
            return
        for column, width in zip(self.columns, widths, strict=True):
            column.width = width
        whole = cast("Iterable[Segment]", super().__rich_console__(console, options))
        for line in Segment.split_lines(whole):
            yield from _without_spaces_at_its_end(line)
            yield Segment.line()

    def _widths(self, console: Console, options: ConsoleOptions) -> list[int] | None:
        """What each column needs, or its share where not all get that; None if words would break.

        A column that does not wrap gets all that it needs.
        """
        least, most = [], []
        for column in self.columns:
            cells = [*([column.header] if self.show_header else []), *column.cells]
            found = [Measurement.get(console, options, cell) for cell in cells]
            most.append(max((each.maximum for each in found), default=0))
            short = max((each.minimum for each in found), default=0)
            least.append(most[-1] if column.no_wrap else max(short, column.min_width or 0))
        gaps = (self.padding[1] + self.padding[3]) * len(least)
        room = options.max_width - gaps - sum(least)
        if room < 0:
            return None
        wanted = [high - low for low, high in zip(least, most, strict=True)]
        share = min(1.0, room / max(1, sum(wanted)))
        return [low + int(share * more) for low, more in zip(least, wanted, strict=True)]

    def _stacked(self) -> Iterator[RenderableType]:
        rows = [*map(list, zip(*(column.cells for column in self.columns), strict=True))]
        headings = [words(str(column.header), "bold") for column in self.columns]
        lines = [
            (first, [cell.copy() for cell in others if isinstance(cell, Text)])
            for first, *others in ([headings] if self.show_header else []) + rows
        ]
        for column in zip(*(others[:-1] for _, others in lines), strict=True):
            width = max(cell.cell_len for cell in column)
            for cell in column:
                cell.pad_right(width - cell.cell_len)
        for first, others in lines:
            yield first
            yield Padding(Text("  ").join(others), (0, 0, 0, 4), expand=False)


def _without_spaces_at_its_end(line: Iterable[Segment]) -> list[Segment]:
    kept = [*line]
    while kept and not (text := kept[-1].text.rstrip(" ")):
        kept.pop()
    return [*kept[:-1], Segment(text, kept[-1].style)] if kept else []


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
    disabled = quiet or is_quiet() or not stderr.is_terminal
    return Progress(*columns, console=stderr, transient=True, disable=disabled)


def working(what: str) -> AbstractContextManager[Any]:
    """A spinner beside `what`, on stderr, while that goes on."""
    return nullcontext() if is_quiet() else stderr.status(f"{what} ...")


_quiet = ContextVar("_quiet", default=False)


@contextmanager
def quiet(asked: bool) -> Iterator[None]:
    """If `asked`, nothing but warnings, errors and JSON is printed inside."""
    before = _quiet.set(asked)
    try:
        yield
    finally:
        _quiet.reset(before)


def is_quiet() -> bool:
    """Whether tables and progress are not wanted."""
    return _quiet.get()


class Shell:
    """A command line that can be copied: it is broken between options, with a backslash.

    Args:
        indent: how many spaces stand before each line.
    """

    def __init__(self, command: str, indent: int = 0) -> None:
        self.command, self.indent = command, indent

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self.lines(options.max_width - self.indent):
            line = " " * self.indent + line
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
_UNBROKEN = ("site", "sites", "input", "method", "keeps")


def table(*columns: str) -> PlainTable:
    """An empty table with these headings."""
    made = PlainTable(header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold", no_wrap=column in _UNBROKEN)
    return made


def site_tables(
    columns: Sequence[str],
    rows: Sequence[Sequence[Text]],
    *,
    whole: bool = False,
    told: Sequence[str] | None = None,
) -> list[RenderableType]:
    """A row for each site; above 30, unless the `whole` is wanted, one for sites of which the same
    is said.

    Args:
        columns: the headings, of which the first is "site".
        told: those of the columns that a group has; by default all but the first.
    """
    if whole or len(rows) <= MOST_ROWS:
        made = table(*columns)
        for row in rows:
            made.add_row(*row)
        return [made]
    kept = [columns.index(name) for name in told or columns[1:]]
    styles = {row[i].plain: row[i].style for row in rows for i in kept}
    cells = [[row[i].plain for i in kept] for row in rows]
    groups = grouped(cells, (row[0].plain for row in rows))
    made = table("sites", *(columns[i] for i in kept))
    for count, *group in groups:
        made.add_row(count, *(words(cell, str(styles.get(cell, ""))) for cell in group))
    hint = f"For each of the {len(rows)} sites add --all, or in Python loop over what is printed."
    return [made, words(hint, "dim")]


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


def to_html(*parts: RenderableType) -> str:
    """`parts` as HTML, for a notebook."""
    console = PlainConsole(file=StringIO(), width=_TEXT_WIDTH, record=True)
    for part in parts:
        console.print(part)
    preformatted = '<pre style="white-space: pre; overflow-x: auto">{code}</pre>'
    return console.export_html(inline_styles=True, code_format=preformatted)


# Displays inside one another must share it (rich >= 14.1).
stderr = PlainConsole(stderr=True)
