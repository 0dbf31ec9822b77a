"""Advice for the terminal."""

import shlex
from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding

from normswap.core.shown import shell_line
from normswap.core.terminal import words
from normswap.report.advice.given import DATA
from normswap.report.advice.suggestion import Advice

_STYLE = {"must": "bold red", "should": "bold green", "could": "bold"}
_INDENT = 3


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


def advice_table(advice: Advice, *, commands: bool = True) -> list[RenderableType]:
    """The suggestions, numbered, each with its reason and the command, or the call in Python."""
    parts: list[RenderableType] = []
    numbers = {each.name: number for number, each in enumerate(advice.suggestions, start=1)}
    for each in advice.suggestions:
        after = f", after {numbers[each.after]}" if each.after in numbers else ""
        heading = words(f"{numbers[each.name]}. ")
        heading.append_text(words(each.what, "bold")).append_text(words("  "))
        parts.append(heading.append_text(words(each.urgency + after, _STYLE[each.urgency])))
        call = Shell(each.command) if commands and each.command else words(each.python, "cyan")
        parts += [Padding(part, (0, 0, 0, _INDENT)) for part in (words(each.why), call)]
        parts.append(words(""))
    if not advice.suggestions:
        parts += [words("Nothing to do.", "bold green")]
    parts += [words(note, "dim") for note in advice.notes]
    if commands and any(DATA in shlex.split(each.command) for each in advice.suggestions):
        parts.append(
            words(
                f"{DATA}: an image folder, a zip of one, an .npz with x and y, or module:factory.",
                "dim",
            )
        )
    return parts
