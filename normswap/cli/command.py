"""How a command gets its options from its signature, and its help from its docstring.

A parameter may be a group, a dataclass whose fields are options. An option is annotated with what
`--help` says of it, or with `typer.Option` where there is more to say, and with the `Panel` in
which it stands there. One that has an effect only beside another is refused without that, not
ignored.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import is_dataclass
from functools import wraps
from inspect import Parameter, Signature, getdoc, signature
from typing import Annotated, Any, get_args, get_type_hints

import typer
from typer.core import TyperCommand
from typer.models import OptionInfo

from normswap.core.errors import NormswapError

EXAMPLES = "Examples:"


def help_of(function: Callable[..., None]) -> tuple[str, str]:
    """What `--help` says of a command by its docstring, and the examples, which stand at its end.

    A paragraph is one line, which the terminal wraps, and so is an example.
    """
    told, _, examples = (getdoc(function) or "").partition(f"{EXAMPLES}\n")
    paragraphs = [" ".join(paragraph.split()) for paragraph in told.split("\n\n")]
    lines = [line.strip() for line in examples.splitlines() if line.strip()]
    epilog = "\n\n".join((EXAMPLES, *lines)) if lines else ""
    return "\n\n".join(paragraphs).strip(), epilog


class Panel:
    """In the annotation of an option, or of a group: the panel of `--help` in which it stands.

    Those without one are the command's own, which `--help` lists first.
    """

    def __init__(self, title: str) -> None:
        self.title = title


def with_groups(function: Callable[..., None]) -> Callable[..., None]:
    """The command `function`, which typer can read: each group stands there as its options."""
    groups: dict[str, tuple[Any, list[str]]] = {}
    options: list[Parameter] = []
    for parameter in signature(function).parameters.values():
        members, kind, panel = [parameter], parameter.annotation, None
        if isinstance(kind, type) and is_dataclass(kind):
            members = list(signature(kind).parameters.values())
            groups[parameter.name] = kind, [member.name for member in members]
            panel = getattr(kind, "panel", None)
        options += [_as_typer_reads(member, panel) for member in members]

    @wraps(function)
    def command(**values: Any) -> None:
        for name, (group, members) in groups.items():
            values[name] = group(**{member: values.pop(member) for member in members})
        function(**values)

    # By keyword alone, an option that is needed may stand after one that is not.
    by_keyword = [option.replace(kind=Parameter.KEYWORD_ONLY) for option in options]
    command.__signature__ = Signature(by_keyword)  # type: ignore[attr-defined]
    command.__annotations__ = {option.name: option.annotation for option in options}
    return command


def _as_typer_reads(option: Parameter, panel: str | None) -> Parameter:
    """`option`, its text as a `typer.Option`, in its panel, or else in that of its group.

    A flag takes no value, and has no other name, which would negate it.
    """
    kind, *rest = get_args(option.annotation)
    flag = kind is bool
    names = [f"--{option.name.replace('_', '-')}"] if flag else []
    for each in rest:
        panel = each.title if isinstance(each, Panel) else panel
    said = []
    for each in rest:
        if isinstance(each, str):
            each = typer.Option(*names, help=each, metavar="" if flag else None)
        if isinstance(each, OptionInfo):
            each = copy(each)
            each.rich_help_panel = panel
        said.append(each)
    return option.replace(annotation=Annotated[(kind, *said)])


class Beside:
    """In the annotation of an option: it has an effect only beside one of `others`.

    Each is written as on the command line, "--data", or with its value, "--precision int8". In a
    command that has none of them the option has an effect by itself.

    Args:
        value: the only value of the option that needs them; by default every value does.
    """

    def __init__(self, *others: str, value: str | None = None) -> None:
        self.others, self.value = others, value


class Command(TyperCommand):
    """A command that refuses an option which it would otherwise ignore."""

    def invoke(self, ctx: Any) -> Any:
        """Carry the command out, if every option that was typed has an effect."""
        for name, hint in get_type_hints(self.callback, include_extras=True).items():
            for each in getattr(hint, "__metadata__", ()):
                if isinstance(each, Beside) and _asked(ctx, name, each.value):
                    _check(name, each, ctx.params)
        return super().invoke(ctx)


def _asked(ctx: Any, name: str, value: str | None) -> bool:
    """Whether the command line gives the option, be it with its default; 0 asks for nothing."""
    typed = ctx.get_parameter_source(name).name == "COMMANDLINE"
    given = ctx.params[name]
    return bool(typed and given and value in (None, given))


def _check(name: str, beside: Beside, values: dict[str, Any]) -> None:
    needed = [each for each in beside.others if _name(each) in values]
    if needed and not any(_holds(each, values) for each in needed):
        flag = f"--{name.replace('_', '-')}"
        said = flag if beside.value is None else f"{flag} {beside.value}"
        raise NormswapError(
            f"{said} has no effect without {' or '.join(needed)}; add that, or leave {said} out"
        )


def _holds(other: str, values: dict[str, Any]) -> bool:
    value, (_, _, wanted) = values[_name(other)], other.partition(" ")
    return bool(value == wanted if wanted else value)


def _name(other: str) -> str:
    return other.partition(" ")[0].removeprefix("--").replace("-", "_")
