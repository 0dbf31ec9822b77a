"""The page and the command that list the methods say what the registry says."""

import json
import runpy
import sys
from pathlib import Path

import pytest

import normswap

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "methods_table.py"


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
    assert all(len(row) == 8 and all(cell.strip() for cell in row) for row in rows)


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
    """What `normswap methods` prints on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")

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
