"""What a person sees: every command on the bundled model, at 80 columns and in a pipe; and Python.

face.txt is a session in a terminal: each command, and below it what it prints into a pipe. What
varies from run to run (times, sizes, figures of rounding) is a `#` there. `python
tests/test_face.py` writes it anew, from the commands that it has.
"""

import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
import torch
from markupsafe import Markup
from rich.text import Text
from typer.main import get_command

import normswap
from normswap import cli, nn
from normswap.cli.app import app
from normswap.core.terminal import PlainConsole, site_tables, table

SESSION = Path(__file__).with_name("face.txt")
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
WIDTH = 80
# A number with a point or an exponent that is no name, and one with a unit.
VARIES = re.compile(
    r"(?<![\w.])(?:\d+(?:\.\d+)?e[+-]\d+|\d+\.\d+)(?![\w.]*\w)"
    r"|(?<![\w.])[\d.,]+(?= (?:ms|s|dB|KiB|bytes|of the largest)\b)"
)
SHARES = re.compile(r"groups: [#\d., ]+(?= %)")


class Both(PlainConsole):
    """Prints into a pipe, and for `narrow` at 80 columns."""

    narrow = io.StringIO()

    def print(self, *parts: object, **options: object) -> None:
        """As both have it."""
        super().print(*parts, **options)  # type: ignore[arg-type]
        PlainConsole(file=self.narrow, width=WIDTH).print(*parts, **options)  # type: ignore[arg-type]


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def commands() -> list[str]:
    return re.findall(r"^\$ (.*)$", SESSION.read_text(), flags=re.M)


def run(words: str) -> str:
    """What the command prints into a pipe, with its exit status where that is not 0."""
    out = io.StringIO()
    with (
        mock.patch.object(sys, "argv", shlex.split(words)),
        mock.patch("normswap.cli.steps.PlainConsole", Both),
        mock.patch("normswap.report.pictures._drawn", lambda *_: Markup()),
        redirect_stdout(out),
        redirect_stderr(out),
        pytest.raises(SystemExit) as ended,
    ):
        cli.main()
    status = f"exit status {ended.value.code}\n" if ended.value.code else ""
    return constant(out.getvalue()) + status


def constant(text: str) -> str:
    """`text` without what varies."""
    return SHARES.sub("groups: #", VARIES.sub("#", text))


def session(folder: Path) -> dict[str, tuple[str, str]]:
    """What each command prints into a pipe, and at 80 columns."""
    printed = {}
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    with inside(folder), mock.patch.dict(os.environ, environment, clear=True):
        for each in commands():
            Both.narrow = io.StringIO()
            printed[each] = run(each), Both.narrow.getvalue()
    return printed


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    torch.manual_seed(0)
    return session(tmp_path_factory.mktemp("face"))


def golden() -> dict[str, str]:
    _, *parts = re.split(r"^\$ (.*)\n", SESSION.read_text(), flags=re.M)
    return dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.parametrize("words", commands())
def test_a_command_prints_into_a_pipe_what_the_session_has(words: str, printed) -> None:
    assert printed[words][0].rstrip() == golden()[words].rstrip()


@pytest.mark.parametrize("words", commands())
def test_at_80_columns_no_word_is_broken_and_no_line_is_longer(words: str, printed) -> None:
    wide, narrow = printed[words]
    assert all(len(line) <= WIDTH for line in narrow.splitlines())
    said = {word for word in constant(narrow).split() if re.search("[A-Za-z]", word)}
    assert said <= {*wide.split()}


def test_the_session_has_every_command_that_needs_no_more_than_the_bundled_model() -> None:
    assert {shlex.split(each)[1] for each in commands()} == {*COMMANDS} - {"methods"}


@pytest.mark.parametrize("name", [*COMMANDS])
def test_help_has_an_example_and_whole_sentences(name: str) -> None:
    short, long = run(f"normswap {name} -h"), run(f"normswap {name} --help")
    assert short == long and "Examples:" in long and f"normswap {name} " in long
    for option in COMMANDS[name].params:
        if option.param_type_name == "option":
            assert re.match(r"[A-Za-z].*\.$", option.help), option.name


def test_a_shell_completes_commands() -> None:
    asked = {"_NORMSWAP_COMPLETE": "complete_bash", "COMP_WORDS": "normswap fol", "COMP_CWORD": "1"}
    with mock.patch.dict(os.environ, asked):
        assert run("normswap").split() == ["fold", "fold-gains"]


def test_quiet_prints_nothing_and_writes_all(tmp_path: Path) -> None:
    with inside(tmp_path):
        assert run("normswap freeze demo:digits --out frozen -q") == ""
    assert (tmp_path / "frozen/report.html").is_file()


# Tables.


def test_above_30_sites_those_of_which_the_same_is_said_are_a_line() -> None:
    rows = [
        [Text(f"layer{i}.bn"), Text(f"group_norm(groups={16 + i % 2 * 16})"), Text("BatchNorm2d")]
        for i in range(34)
    ]
    rows[5][1:] = [Text("left"), Text("its input comes from layer4.relu")]
    lines = text_of(*site_tables(("site", "what", "why"), rows))
    assert lines[1].split("  ")[0] == "33 x" and "group_norm(groups=16 to 32)" in lines[1]
    assert lines[2].startswith("1 x") and "its input comes from layer4.relu" in lines[2]
    whole = text_of(*site_tables(("site", "what", "why"), rows, whole=True))
    assert [line.split()[0] for line in whole[1:]] == [f"layer{i}.bn" for i in range(34)]


def test_names_that_do_not_fit_beside_each_other_stand_below_each_other() -> None:
    name = "encoder.layer.{}.attention.output.LayerNorm"
    rows = table("site", "fold")
    rows.add_row(name.format(1), f"into {name.format(2)}")
    assert text_of(rows, width=60) == [
        "site",
        "    fold",
        name.format(1),
        f"    into {name.format(2)}",
    ]


def text_of(*parts: object, width: int = 120) -> list[str]:
    buffer = io.StringIO()
    console = PlainConsole(file=buffer, width=width)
    for part in parts:
        console.print(part)
    return buffer.getvalue().splitlines()


# Python.


@pytest.fixture(scope="module")
def results() -> Iterator[dict[str, object]]:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)).eval()
    x = torch.randn(2, 3, 4, 4)
    yield {
        "plan": normswap.plan(model, normswap.Fold(), inputs=x),
        "inspection": normswap.inspect(model, x),
        "advice": normswap.advise(model, x, batch_size=2),
        "comparison": normswap.compare(model, normswap.fold(model, x), x),
    }


NAMES = {"plan": "1", "inspection": "1", "comparison": "1"}


def test_what_an_export_reports_is_shown_alike(tmp_path: Path) -> None:
    model = nn.RMSNorm(4)
    report = normswap.export(model, torch.ones(2, 4), tmp_path / "a.onnx")
    for each in (report, report.validation):
        assert repr(each).startswith(f"<{type(each).__name__}: ") and "\n" not in repr(each)
        assert "validation passed" in repr(each) and each._repr_html_().startswith("<pre")
        assert "model_dump" not in dir(each) and str(each).count("\n") > 3
    assert report.validation["given"] is next(iter(report.validation))
    assert report.model_dump(mode="json")["validation"]["cases"][0]["name"] == "given"


def test_a_notebook_shows_a_result_once(results, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = mock.Mock()
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("rich.jupyter.display", shown)
    for result in results.values():
        assert str(result) and result._repr_html_()
    assert not shown.called


@pytest.mark.parametrize("name", ["plan", "inspection", "advice", "comparison"])
def test_a_result_is_a_line_a_table_and_html_and_holds_its_entries(name: str, results) -> None:
    result = results[name]
    assert repr(result).startswith(f"<{type(result).__name__}: ") and "\n" not in repr(result)
    assert str(result).count("\n") > 1 and not str(result).startswith("<")
    assert result._repr_html_().startswith("<pre")
    entries = list(result)
    assert len(result) == len(entries) > 0 and result[0] == entries[0] and result[-1] == entries[-1]
    found = result[NAMES.get(name, getattr(entries[0], "name", ""))]
    assert found in entries or found[0] in entries
    with pytest.raises(KeyError, match="nowhere"):
        result["nowhere"]


@pytest.mark.parametrize("name", ["plan", "inspection", "advice", "comparison"])
def test_completion_offers_nothing_of_pydantic(name: str, results) -> None:
    public = {each for each in dir(results[name]) if not each.startswith("_")}
    assert not public & {"model_dump", "model_fields", "copy", "dict", "json", "construct"}
    assert {"summary", "tables"} <= public
    assert all(hasattr(results[name], each) for each in public)


def test_the_modules_of_nn_are_imported_when_they_are_used() -> None:
    code = "import sys, normswap.nn as nn; assert 'torch' not in sys.modules and dir(nn)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert nn.GhostBatchNorm.__name__ == "GhostBatchNorm"


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as made:
        told = session(Path(made))
    SESSION.write_text("\n".join(f"$ {words}\n{wide}" for words, (wide, _) in told.items()))
