"""Rows of a table that say the same of many sites, as one row for each thing that is said.

Two rows say the same if they differ in numbers and in the names of modules alone: the row of both
has the range of the numbers, and how many names there are.
"""

import re
from collections.abc import Iterable, Sequence

MOST_ROWS = 30  # a table with more is grouped

# A word that is not called, as a class is in BatchNorm2d(64).
_WORD = re.compile(r"(?<![\w.])[\w.]*\w(?!\w|\.\w|\()")
# Of these a number, or the path of a module: it holds a point or a digit.
_VARYING = re.compile(r"\d+(?:\.\d+)?|(?=[\w.]*[.\d])[A-Za-z_][\w.]*")


def grouped(rows: Iterable[Sequence[str]], names: Iterable[str] = ()) -> list[list[str]]:
    """One row for each group: how many it has, and what is said of them.

    Args:
        rows: of as many cells each.
        names: those of modules that look like words.
    """
    known = frozenset(names)
    groups: dict[tuple[str, ...], list[Sequence[str]]] = {}
    for row in rows:
        pattern = tuple(_pattern(cell, known) for cell in row)
        groups.setdefault(pattern, []).append(row)
    return [
        [f"{len(group)} x", *(_common(cells, known) for cells in zip(*group, strict=True))]
        for group in sorted(groups.values(), key=len, reverse=True)
    ]


def _parts(cell: str, known: frozenset[str]) -> list[tuple[bool, str]]:
    """The cell in pieces, and whether each is a number or a name."""
    parts, end = [], 0
    for match in _WORD.finditer(cell):
        if match[0] in known or _VARYING.fullmatch(match[0]):
            parts += [(False, cell[end : match.start()]), (True, match[0])]
            end = match.end()
    return [*parts, (False, cell[end:])]


def _pattern(cell: str, known: frozenset[str]) -> str:
    return "\0".join("" if varies else text for varies, text in _parts(cell, known))


def _common(cells: Sequence[str], known: frozenset[str]) -> str:
    """What all these cells say."""
    said = []
    for same in zip(*(_parts(cell, known) for cell in cells), strict=True):
        values = list(dict.fromkeys(text for _, text in same))
        said.append(values[0] if len(values) == 1 else _range(values))
    return "".join(said)


def _range(values: Sequence[str]) -> str:
    try:
        ordered = sorted(values, key=float)
    except ValueError:
        return f"{values[0]} and {len(values) - 1} more"
    return f"{ordered[0]} to {ordered[-1]}"
