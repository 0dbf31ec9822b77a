"""The command line, which `python -m normswap` runs as well.

torch is imported inside the commands, so that `--help` answers at once. Exit status: 0 done, 1 done
but a check did not hold, 2 bad usage or input (one line says what and what to do), 130 interrupted.
"""

import os
import sys
import traceback
import warnings
from io import TextIOWrapper
from typing import Any

import typer

from normswap.cli.app import app
from normswap.core.errors import Interrupted, NormswapError, first_line
from normswap.core.paths import check_text
from normswap.core.shown import LONGEST_NAME, shown
from normswap.core.terminal import stderr

INTERRUPTED, BROKEN_PIPE = 130, 141  # 128 + SIGINT, + SIGPIPE, as shells have it
# With one of these typer answers a shell that completes command lines, and ends the process.
_COMPLETION = "_NORMSWAP_COMPLETE", "--install-completion", "--show-completion"


def main() -> None:
    """Run the command line and exit with its status."""
    arguments = sys.argv[1:] or ["--help"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a name that its encoding lacks must stop nothing
            stream.reconfigure(errors="backslashreplace")
    if not {*os.environ, *arguments[:1]}.isdisjoint(_COMPLETION):
        app(arguments, prog_name="normswap")
    try:
        for argument in arguments:
            check_text(argument)
        with warnings.catch_warnings():
            warnings.showwarning = _in_one_line
            status = app(arguments, prog_name="normswap", standalone_mode=False)
        if status == INTERRUPTED:  # so typer tells of Ctrl-C, or by Abort, as its version is
            raise KeyboardInterrupt
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        if any(isinstance(each, BrokenPipeError) for each in (error, error.__context__)):
            # Who reads has seen enough, such as head; of that rich makes a SystemExit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(BROKEN_PIPE)
        message, status = _last_words(error)
        trace = traceback.format_exc().splitlines() if "--debug" in arguments else []
        for line in (*trace, f"normswap: {message}"):
            print(shown(line), file=sys.stderr)
    sys.exit(status if isinstance(status, int) else 0)


def _help_of(error: Any) -> str:
    """The command that helps with a usage error."""
    context = getattr(error, "ctx", None)
    return f"{context.command_path if context else 'normswap'} --help"


def _in_one_line(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, (DeprecationWarning, PendingDeprecationWarning)):
        return  # of a library, for who writes code with it
    stderr.print(f"normswap: warning: {shown(message)}", soft_wrap=True)


def _last_words(error: BaseException) -> tuple[str, int]:
    """One line about what ended the command, and the exit status."""
    if isinstance(error, NormswapError):
        return str(error), 2
    if isinstance(error, Interrupted):
        return str(error), INTERRUPTED
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return "interrupted; existing files were not changed", INTERRUPTED
    if isinstance(error, OSError) and error.strerror:
        where = f" {shown(error.filename, LONGEST_NAME)!r}" if error.filename else ""
        return f"cannot use the file or folder{where}: {error.strerror}; name another", 2
    if isinstance(error, SystemExit):  # nothing of ours, or of typer, raises it in here
        return "code of the model, the data or a method ended Python (SystemExit); correct it", 2
    if hasattr(error, "format_message"):  # a usage error, of the click that typer brings along
        said, meant, guess = error.format_message().rstrip(".").partition(". Did you mean")
        said += f" (did you mean{guess})" if meant else ""
        return f"{said[:1].lower()}{said[1:]}; see {_help_of(error)}", 2
    return (
        f"unexpected error ({type(error).__name__}: {first_line(error)}); rerun with --debug and "
        "please report it",
        2,
    )
