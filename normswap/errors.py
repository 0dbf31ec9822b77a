"""The one error that is the user's to mend, and other people's errors in one line.

The message of a `NormswapError` is a single line that says what is wrong and what to do about it.
The command line prints that line and exits with status 2; every other exception is a defect of
normswap.
"""

_MOST_CHARACTERS = 240


class NormswapError(ValueError):
    """Bad input or a request that cannot be carried out; the message names the remedy."""


class Interrupted(Exception):
    """Ctrl-C in work that can be gone on with; the message says how."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something, or its type where none does."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)[:_MOST_CHARACTERS]
