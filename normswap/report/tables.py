"""Tables for the terminal: of the methods, and of the facts of a result."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType

from normswap.core.terminal import PlainTable, table, words

if TYPE_CHECKING:
    from normswap.norms.registry import Method

METHOD_FACTS = (
    "kind", "keeps", "summary", "formula", "source", "statistics", "batch_independent", "cost",
    "onnx", "options", "swap", "needs_running", "folds_scale",
)  # fmt: skip


def methods_tables(methods: Mapping[str, "Method"]) -> list[RenderableType]:
    """For each kind, one row for each method."""
    parts: list[RenderableType] = []
    for kind in dict.fromkeys(method.kind for method in methods.values()):
        rows = table("method", "keeps", "what it is", "options")
        for name, method in methods.items():
            if method.kind == kind:
                rows.add_row(name, method.keeps, method.summary, ", ".join(method.options))
        parts += [words(f"{kind} methods", "bold"), rows, words("")]
    return parts[:-1]


def invariances_table(found: Mapping[str, Mapping[str, bool]]) -> PlainTable:
    """One row for each method, one column for each change that it may not see."""
    columns = next(iter(found.values()), {})
    rows = table("method")
    for column in columns:
        heading = _in_few_letters(column)
        rows.add_column(heading, min_width=max(map(len, heading.split())))
    for name, stays in found.items():
        cells = {True: words("yes", "green"), False: words("no")}
        rows.add_row(name, *(cells[stays[column]] for column in columns))
    return rows


def _in_few_letters(change: str) -> str:
    short = {"re-scaling": "scaled", "re-centering": "shifted", "dataset": "data", "training": ""}
    return " ".join(short.get(word, word) for word in change.split())


def facts_table(title: str, facts: Sequence[tuple[str, str]]) -> PlainTable:
    """Names and values, for the result of a command."""
    rows = PlainTable(title=title, title_justify="left", show_header=False)
    rows.add_column(style="bold")
    rows.add_column(overflow="fold")
    for name, value in facts:
        rows.add_row(name, value)
    return rows
