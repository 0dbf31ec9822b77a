"""A group of options stands in a command as if its options were written there."""

from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from normswap.cli.command import Beside, Command, with_groups
from normswap.core.errors import NormswapError


@dataclass(frozen=True)
class Scaling:
    mean: Annotated[float, "Subtracted.", Beside("--data")] = 0.0
    invert: Annotated[bool, "Turned around."] = False


def run(*words: str) -> dict[str, Any]:
    """What the command is called with."""
    seen: dict[str, Any] = {}

    def scale(
        *, first: Annotated[int, "A number."] = 1, scaling: Scaling, data: Annotated[str, "What."]
    ) -> None:
        seen.update(first=first, scaling=scaling, data=data)

    app = typer.Typer()
    app.command(cls=Command)(with_groups(scale))
    result = CliRunner().invoke(app, list(words), catch_exceptions=True)
    if isinstance(result.exception, NormswapError):
        raise result.exception
    seen["exit"], seen["help"] = result.exit_code, result.stdout
    return seen


def test_the_options_of_a_group_come_as_the_group() -> None:
    seen = run("--data", "x", "--mean", "2", "--invert")
    assert (seen["first"], seen["data"]) == (1, "x")
    assert seen["scaling"] == Scaling(mean=2.0, invert=True)


def test_help_lists_them_in_the_place_of_the_group_and_flags_without_a_negation() -> None:
    text = run("--help")["help"]
    places = [text.index(f"--{name}") for name in ("first", "mean", "invert", "data")]
    assert places == sorted(places) and "--no-" not in text
    assert "Subtracted." in text


def test_an_option_may_be_needed_behind_others_that_are_not() -> None:
    assert run()["exit"] == 2 and "scaling" not in run()


def test_what_a_group_says_only_beside_another_option_is_refused_without_it() -> None:
    with pytest.raises(NormswapError, match="--mean has no effect without --data"):
        run("--data", "", "--mean", "2")
