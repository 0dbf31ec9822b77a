"""What installed packages add through entry points; one that cannot be had is left out."""

import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from importlib.metadata import EntryPoint, distributions, entry_points
from typing import TypeVar

from normswap.core.errors import NormswapError, told, warn
from normswap.core.shown import LONGEST_NAME, shown

T = TypeVar("T")


def entries(group: str) -> Iterator[EntryPoint]:
    """The entry points of a group, of all installed packages."""
    try:
        yield from entry_points(group=group)
    except Exception:  # the metadata of some package, which need not know of us, are damaged
        for package in distributions():
            with suppress(Exception):
                yield from package.entry_points.select(group=group)


def used(entry: EntryPoint, what: str, use: Callable[[EntryPoint], T]) -> T | None:
    """What `use` makes of an entry point; None and a warning where it fails.

    Args:
        what: it adds, "the method".
    """
    try:
        with redirect_stdout(sys.stderr):  # what a package prints is not in a command's result
            return use(entry)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # of code that is not ours: SystemExit and its like as well
        why = str(error) if isinstance(error, NormswapError) else f"it raises {told(error)}"
        warn(f"{_described(entry, what)} is left out: {why}; fix or uninstall it", stacklevel=4)
        return None


def _described(entry: EntryPoint, what: str) -> str:
    name, value = (shown(text, LONGEST_NAME) for text in (entry.name, entry.value))
    package = ""
    with suppress(Exception):  # its metadata may be damaged, or it may come without any
        package = f" of the installed package {shown(entry.dist.name, LONGEST_NAME)!r}"  # type: ignore[union-attr]
    return f"{what} {name!r} ({value}){package}"
