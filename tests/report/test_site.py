"""The site in a browser: nothing is fetched, nothing is cut off, and both themes can be read."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_page import CONTRASTS

pytest.importorskip("mkdocs")
pytest.importorskip("material")
pytest.importorskip("latex2mathml")

ROOT = Path(__file__).parents[2]
PAGES = ("index", "methods", "figures", "recover", "cli", "api/rewrite", "api/nn")
WIDTHS = (1400, 390)
SCHEMES = {"light": "default", "dark": "slate"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", out]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_fetches_nothing_and_need_not_scroll_sideways(name, width, site, opened) -> None:
    page = opened(site / f"{name}.html", width=width)
    outside = [each for each in page.problems if not each.startswith("file://")]
    assert outside == []
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", PAGES)
def test_the_text_of_a_page_stands_out_in_both_themes(name, scheme, site, opened) -> None:
    """At least 4.5 to 1 (WCAG 2.2, 1.4.3); code has the colors of the theme's highlighter."""
    page = opened(site / f"{name}.html", width=390, color_scheme=scheme)
    assert page.locator("body").get_attribute("data-md-color-scheme") == SCHEMES[scheme]
    page.evaluate("""() => {
        document.body.replaceChildren(document.querySelector('article'));
        document.querySelectorAll('pre, .headerlink, .md-content__button, nav, form')
            .forEach(each => each.remove());
    }""")
    found = page.evaluate(CONTRASTS)
    assert len(found) > 20
    assert min(found)[0] >= 4.5, min(found)


def test_the_methods_are_shown_whole_with_their_formulas(site, opened) -> None:
    page = opened(site / "methods.html", width=1400)
    cut = "table => table.scrollWidth > table.closest('.methods').clientWidth"
    tables = page.locator(".methods table")
    assert [tables.nth(i).evaluate(cut) for i in range(tables.count())] == [False] * 4
    assert page.locator(".methods math").count() >= 30
    assert not any(mark in page.locator("article").inner_text() for mark in ("\\", "$"))
    assert page.locator('a[href^="https://arxiv.org/abs/"]').count() >= 30


def test_a_phone_shows_figures_beside_the_names_of_each_table(site, opened) -> None:
    page = opened(site / "figures.html", width=390)
    found: list[Any] = page.evaluate("""() => [...document.querySelectorAll('article table')].map(
        table => {
            const [name, figure] = table.querySelector('tbody tr').children;
            return [figure.getBoundingClientRect().left, name.textContent];
        })""")
    assert len(found) > 10
    assert max(found)[0] < 250, max(found)


def test_a_signature_is_broken_and_that_of_a_class_is_its_constructor(site, opened) -> None:
    page = opened(site / "api" / "rewrite.html", width=1400)
    signature = page.locator('[id="normswap.api.convert"] + .doc-signature').inner_text()
    assert "\n    to: str,\n" in signature and "inputs: Inputs | None" in signature
    page = opened(site / "api" / "nn.html", width=1400)
    shown = page.locator('[id="normswap.norms.batch.renorm.BatchRenorm"] + .doc-signature')
    assert "r_max: float = 3.0" in shown.inner_text()
