"""The page and the command that list the methods say what the registry says."""

import importlib
import json
import re
import runpy
import sys
from pathlib import Path

import pytest

import normswap

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "methods_table.py"


@pytest.fixture(autouse=True)
def _tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TOOL.parent)


@pytest.mark.parametrize(
    ("formula", "written"),
    [
        ("g v / ||v||", r"$\frac{g v}{\lVert v\rVert}$"),
        ("a (x - b) / c d + e", r"$\frac{a (x - b)}{c} d + e$"),
        (
            "x / (y + eps)^-beta, y: a sample",
            r"$\frac{x}{(y + \varepsilon)^{-\beta}}$, $y$: a sample",
        ),
        ("max(E_nc[x^2], tau)", r"$\max(E_{nc}[x^{2}] , \tau)$"),
        ("the channels", "the channels"),
    ],
)
def test_a_formula_is_set_as_it_reads(formula, written) -> None:
    assert importlib.import_module("formulas").markdown(formula) == written


@pytest.mark.parametrize("formula", sorted({each.formula for each in normswap.methods().values()}))
def test_a_set_formula_has_every_symbol_in_its_order(formula) -> None:
    """Letters and digits of both, but for the commands and the names of operators."""
    written = importlib.import_module("formulas").markdown(formula)
    assert "$" in written
    commands = r"\\(frac|left|right|operatorname|lvert|rvert|lVert|rVert)(?![a-z])"
    plain = re.sub(commands, "", written).replace("varepsilon", "eps").replace("\\Delta", "d")
    assert re.findall(r"\w", plain.replace("_", "")) == re.findall(r"\w", formula.replace("_", ""))


def test_a_formula_with_a_bracket_that_is_open_or_too_many_is_refused() -> None:
    for formula in ("(x", "x)", "|x"):
        with pytest.raises(ValueError, match=r"closed|too many"):
            importlib.import_module("formulas").latex(formula)


def test_page_is_the_generators() -> None:
    """Otherwise: python tools/methods_table.py"""
    page = runpy.run_path(str(TOOL))["page"]()
    assert (ROOT / "docs" / "methods.md").read_text() == page


def test_page_has_a_full_row_for_every_method() -> None:
    rows = [
        line.split(" | ")
        for line in (ROOT / "docs" / "methods.md").read_text().splitlines()
        if line.startswith("| `")
    ]
    assert [row[0].split("`")[1] for row in rows] == [
        name
        for kind in ("activation", "weight", "recurrent", "input")
        for name, method in normswap.methods().items()
        if method.kind == kind
    ]
    assert all(len(row) == 6 and all(cell.strip() for cell in row) for row in rows)


def test_check_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    page = ROOT / "docs" / "methods.md"
    before = page.stat().st_mtime_ns
    monkeypatch.setattr(sys, "argv", [str(TOOL), "--check"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert not ended.value.code
    assert page.stat().st_mtime_ns == before


@pytest.fixture
def methods(run, monkeypatch: pytest.MonkeyPatch):
    """What `normswap methods` prints on a wide terminal."""
    monkeypatch.setenv("COLUMNS", "200")

    def command(*arguments: str) -> str:
        status, out, _ = run("methods", *arguments)
        assert status == 0
        return out

    return command


def test_command_lists_every_method_under_its_kind(methods) -> None:
    kind, listed = None, {}
    for line in methods().splitlines():
        first, *others = line.split() or [""]
        if others == ["methods"]:
            kind = first
        elif first in normswap.methods() and not line.startswith(" "):
            listed[first] = kind, others[0]
    assert listed == {name: (m.kind, m.keeps) for name, m in normswap.methods().items()}


def test_command_gives_all_facts_as_json(methods) -> None:
    facts = json.loads(methods("--json"))
    for name, method in normswap.methods().items():
        assert facts[name]["formula"] == method.formula
        assert facts[name]["source"] == method.source
        assert facts[name]["options"] == list(method.options)
        assert facts[name]["batch_independent"] == method.batch_independent


def test_command_computes_the_invariances(methods) -> None:
    rows = {line.split()[0]: line.split()[1:] for line in methods("--invariances").splitlines()}
    assert rows["layer_norm"] == ["yes", "yes", "no", "yes", "no", "yes"]
    stays = json.loads(methods("--invariances", "--json"))
    assert stays.keys() == normswap.methods().keys()
    assert list(stays["layer_norm"].values()) == [True, True, False, True, False, True]
