"""The one error that is the user's to mend, warnings, and other people's errors in one line.

The message of a `NormswapError` is a single line that says what is wrong and what to do about it.
The command line prints that line and exits with status 2; every other exception is a defect of
normswap.
"""

import warnings

from normswap.core.shown import shown

_MOST_CHARACTERS = 240
_MOST_OF_A_MESSAGE = 800


class NormswapError(ValueError):
    """Bad input or a request that cannot be carried out; the message names the remedy."""

    def __init__(self, message: str) -> None:
        # What it quotes may be from a file: `normswap.core.shown`.
        super().__init__(shown(message, _MOST_OF_A_MESSAGE))


class Unsupported(Exception):
    """A site that a rewrite must leave as it is; the message is the reason in the plan."""


class Interrupted(Exception):
    """Ctrl-C in work that can be gone on with; the message says how."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something, or its type where none does."""
    kind = type(error).__name__
    try:
        lines = (line.strip() for line in str(error).splitlines())
        return shown(next(filter(None, lines), kind), _MOST_CHARACTERS)
    except Exception:  # the text of somebody else's exception is code of theirs
        return shown(kind, _MOST_CHARACTERS)


def told(error: BaseException) -> str:
    """What other people's code raised: the exception's type and the first line of its message."""
    kind, line = shown(type(error).__name__, _MOST_CHARACTERS), first_line(error)
    return kind if line == kind else f"{kind}: {line}"


def warn(message: str, *, stacklevel: int) -> None:
    """A warning in one line; `stacklevel` as that of `warnings.warn`, seen from the caller."""
    warnings.warn(shown(message, _MOST_OF_A_MESSAGE), stacklevel=stacklevel + 1)
