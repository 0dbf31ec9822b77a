"""The charts of the documentation show the figures that stand beside them, in both themes."""

import csv
import importlib
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
CHARTS = sorted((ROOT / "docs" / "charts").glob("*.svg"), key=lambda path: path.stem)
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(autouse=True)
def _without_pictures() -> None:
    """Here they are drawn."""


@pytest.fixture
def charts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("charts")


def texts(drawn: ElementTree.Element, space: str = SVG) -> list[str]:
    return ["".join(each.itertext()) for each in drawn.iter(f"{space}text")]


def test_every_chart_is_drawn_and_shown_on_a_page(charts) -> None:
    places = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    pages = "".join(page.read_text(encoding="utf-8") for page in places)
    assert [chart.stem for chart in CHARTS] == sorted(charts.CHARTS)
    assert all(f"charts/{chart.name})" in pages for chart in CHARTS)


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.stem)
def test_a_chart_is_what_the_figures_give(charts, chart) -> None:
    """Otherwise: python tools/charts.py"""
    drawn = ElementTree.fromstring(charts.CHARTS[chart.stem]())
    assert texts(ElementTree.parse(chart).getroot()) == texts(drawn, "")


def test_the_chart_of_the_zoo_has_the_totals_of_its_rows() -> None:
    with (ROOT / "docs" / "zoo.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["error"]]
    every = sum(int(row["batch_norms"]) for row in rows)
    kept = sum(int(row["left"]) for row in rows)
    shown = texts(ElementTree.parse(ROOT / "docs" / "charts" / "zoo.svg").getroot())
    assert f"{100 - 100 * kept / every:.1f} %" in shown


def test_the_chart_of_private_training_has_its_accuracies() -> None:
    starts = json.loads((ROOT / "docs" / "private.json").read_text(encoding="utf-8"))["starts"]
    shown = texts(ElementTree.parse(ROOT / "docs" / "charts" / "private.svg").getroot())
    assert all(f"{start['accuracy']['3'][0]:.1f} %" in shown for start in starts.values())


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("theme", "paper"), [("light", "#ffffff"), ("dark", "#1e2129")])
@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.stem)
def test_a_chart_stands_out_from_the_page_of_each_theme(chart, theme, paper) -> None:
    """Texts by 4.5 to 1 and curves by 3 to 1 (WCAG 2.2, 1.4.3 and 1.4.11)."""
    light, dark = ElementTree.parse(chart).getroot().find(f"{SVG}style").text.split("@media")
    colors = dict(re.findall(r"(--\w+): (#\w{6});", light if theme == "light" else dark))
    for name in set(re.findall(r"var\((--\w+)\)", chart.read_text())) - {"--line"}:
        bright, dim = sorted((luminance(colors[name]), luminance(paper)), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= (4.5 if name in ("--ink", "--soft") else 3), name
