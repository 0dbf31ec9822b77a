"""`report.html` in a browser: whole, readable everywhere, and of the same figures as the JSON."""

import json
import math
import re
from collections.abc import Callable
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normswap
from normswap.demo.digits import digits, digits_data
from normswap.fit.data import open_data
from normswap.passes.plan import Plan, Skipped
from normswap.passes.replace import replacement
from normswap.report.converted import States, converted
from normswap.report.latency import Latency
from normswap.report.measurements import Measurements, Size
from normswap.report.outputs import SiteOutput
from normswap.report.page import page, write_report
from normswap.report.pictures import MOST_NAMED, Bar, Curve, bars, curves
from normswap.report.rewrite import RewriteReport, deliver, ship

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }}{% raw %}",
    "$\\frac{1}{2}$ & ~1/#000001; font-family: x;",
    "</svg><style>body { display: none }</style>",
    "layers-" + "verylongname" * 20,
)


def replaced(sites: int, names: tuple[str, ...] = (), **changes: Any) -> RewriteReport:
    """The report of a conversion that was not run."""
    names = names or tuple(f"blocks-{i}-norm" for i in range(sites))
    model = nn.Module()
    for name in names:
        model.add_module(name, nn.BatchNorm2d(8))
    plan = normswap.plan(model, normswap.Replace("group_norm", groups=2)) if names else Plan()
    levels = [math.inf, math.nan, -math.inf, None, -3.5, 0.0, 1e-3, 140.2]
    found = [levels[i % 8] if i < 16 else 20 + 15 * math.sin(i / 7) for i in range(len(names))]
    measured = Measurements(
        compared_on="the example inputs, 1x8x4x4",
        sites=[
            *(
                SiteOutput(site=n, snr_db=v, note="" if v is not None else "of another shape")
                for n, v in zip(names, found, strict=True)
            ),
            SiteOutput(site="", snr_db=12.0),
        ],
        timed_on="the example inputs",
        latency=[
            Latency(
                model="original",
                runtime="torch",
                milliseconds=1234.5,
                lower=99.96,
                upper=2e3,
                runs=3,
            )
        ],
        sizes=[Size(model="original", parameters=None, bytes=3 << 31)],
        environment={"torch": "2"},
    )
    made = RewriteReport(model=changes.pop("model", "m"), plan=plan, measurements=measured)
    return made.model_copy(update=changes)


def hostile() -> RewriteReport:
    left = tuple(Skipped(site=name, reason=name) for name in HOSTILE)
    report = replaced(0, HOSTILE, model=HOSTILE[0], measured_on=HOSTILE[1], command=HOSTILE[4])
    states = dict.fromkeys(HOSTILE, 0.5)
    plan = report.plan.model_copy(update={"left": left})
    return report.model_copy(update={"plan": plan, "accuracy": states})


def nothing_known() -> RewriteReport:
    return RewriteReport(model="m", plan=Plan(), deviation=math.nan, allowed=1e-5)


def write_converted(out: Path) -> None:
    model, inputs = digits(), digits_data("test")[0][:2]
    data = open_data("demo:digits", limit=128)
    states = States("demo:digits", data, "some digits")
    replace = replacement("group_norm", groups=4)
    student, report = converted(states, model, replace, inputs, data, data, steps=5)
    typed = "normswap convert demo:digits --to group_norm"
    given = {"original": model, "inputs": inputs, "data": data, "onnx": True, "command": typed}
    deliver(report, student, out, **given)


def write_shipped(out: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    ship("net.py:small", model, torch.randn(2, 3, 8, 8), out)


def write_compared(out: Path) -> None:
    folded = normswap.fold(digits(), digits_data("test")[0][:2])
    data = open_data("demo:digits", limit=128)
    normswap.compare(digits(), folded, data=data, measured_on="some digits").write(out)


WRITTEN = {"converted": write_converted, "shipped": write_shipped, "compared": write_compared}
MADE = {
    "hostile": hostile,
    "no sites": lambda: replaced(0),
    "as many named sites as fit": lambda: replaced(MOST_NAMED - 1),
    "500 sites": lambda: replaced(500),
    "nothing known": nothing_known,
}
KINDS = (*WRITTEN, *MADE)


@pytest.fixture(autouse=True)
def _without_pictures() -> None:
    """Here reports have theirs."""


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The page of a kind of report; its `report.json` lies beside it."""

    @cache
    def written(kind: str) -> Path:
        out = tmp_path_factory.mktemp("report")
        if kind in WRITTEN:
            WRITTEN[kind](out)
        else:
            write_report(MADE[kind](), out)
        return out / "report.html"

    return written


@pytest.mark.parametrize("kind", KINDS)
def test_it_opens_without_errors_or_outside_requests(kind, html, opened):
    page = opened(html(kind))
    assert page.problems == []
    assert page.title().endswith("normswap")
    assert page.locator("script, iframe, link[rel=stylesheet], img, [src]").count() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_its_figures_are_those_of_the_json(kind, html, opened):
    values = json.loads(html(kind).with_suffix(".json").read_text(), parse_constant=pytest.fail)
    figures = opened(html(kind)).evaluate(
        "() => [...document.querySelectorAll('[data-figure]')]"
        ".map(e => [e.dataset.figure, e.dataset.value, e.textContent.trim()])"
    )
    assert len(figures) >= (20 if kind in WRITTEN else 1)
    for pointer, exact, shown in figures:
        value = look_up(values, pointer)
        assert json.loads(exact) == value, pointer
        assert agrees(shown, value), (pointer, shown, value)


def look_up(values: Any, pointer: str) -> Any:
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        values = values[int(key) if isinstance(values, list) else key]
    return values


SHOWN = re.compile(r"(?P<number>\u2212?[\d,.]+(?:e[+-]\d+)?)\s?(?P<unit>%|dB|ms|s|B|KiB|MiB|GiB|)")
UNITS = {"%": 0.01, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def agrees(shown: str, value: Any) -> bool:
    """Whether `shown` is `value`, rounded to as many digits as it shows."""
    words = {"NaN": "NaN", "∞": "Infinity", "\N{MINUS SIGN}∞": "-Infinity", "\N{EN DASH}": None}
    words["not comparable"] = None
    if shown in words:
        return words[shown] == value
    found = SHOWN.fullmatch(shown)
    assert found, shown
    number = Decimal(found["number"].replace(",", "").replace("\N{MINUS SIGN}", "-"))
    unit = UNITS.get(found["unit"], 1)
    half = 0.501 * 10.0 ** number.as_tuple().exponent * unit
    return abs(float(number) * unit - value) <= half


@pytest.mark.parametrize("kind", KINDS)
def test_a_phone_need_not_scroll_sideways_and_can_read_the_pictures(kind, html, opened):
    page = opened(html(kind), width=360)
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    texts = page.evaluate("""() => [...document.querySelectorAll('svg text')]
        .filter(text => text.checkVisibility()).map(text => {
            const box = text.getBoundingClientRect();
            return [box.height, box.left, box.right, text.textContent];
        })""")
    assert texts or kind in ("no sites", "nothing known", "shipped")
    for height, left, right, text in texts:
        assert height >= 10 and left >= 0 and right <= 360, text


# Of every text that is seen: its color, and the first background behind it that is not transparent.
CONTRASTS = """() => {
    const number = color => color.match(/[\\d.]+/g).map(Number);
    const light = color => {
        const [r, g, b] = number(color).map(c => c / 255)
            .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = element => {
        for (; element; element = element.parentElement) {
            const color = getComputedStyle(element).backgroundColor;
            if (number(color)[3] !== 0) return color;
        }
        return 'rgb(255, 255, 255)';
    };
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const element = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
        const style = getComputedStyle(element);
        const ink = light(element.closest('svg') ? style.fill : style.color);
        const paper = light(behind(element));
        const [low, high] = [Math.min(ink, paper), Math.max(ink, paper)];
        found.push([(high + 0.05) / (low + 0.05), paper, walker.currentNode.data.trim()]);
    }
    return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_text_stands_out_from_its_background(kind, scheme, html, opened):
    """At least 4.5 to 1, which WCAG 2.2 asks for (success criterion 1.4.3)."""
    found = opened(html(kind), color_scheme=scheme).evaluate(CONTRASTS)
    assert found
    assert all((paper < 0.1) == (scheme == "dark") for _, paper, _ in found)
    assert min(found)[0] >= 4.5, min(found)


@pytest.mark.parametrize("kind", ["converted", "compared"])
def test_it_prints_everything_dark_on_white(kind, html, opened):
    page = opened(html(kind), color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert all(paper > 0.9 and ratio >= 4.5 for ratio, paper, _ in page.evaluate(CONTRASTS))
    seen = page.evaluate(
        "() => [...document.querySelectorAll('h1, h2, td, pre, dd, li, svg.wide')]"
        ".map(e => e.checkVisibility() && e.getBoundingClientRect().height > 0)"
    )
    assert len(seen) > 40 and all(seen)
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_hostile_names_are_text_and_nothing_else(html, opened):
    page = opened(html("hostile"))
    assert page.problems == []
    text = page.locator("body").inner_text()
    assert all(name in text for name in HOSTILE)


def test_a_name_that_no_xml_may_hold_has_a_page_too():
    text = page(replaced(0, ("a\x0b\x00b", "c")))
    assert r"a\x0b\x00b" in text and not {"\x0b", "\x00"} & set(text)


def test_a_reader_that_does_not_see_is_told_what_the_pictures_and_tables_are(html, opened):
    page = opened(html("converted"))
    assert page.locator("html[lang=en]").count() == 1
    assert page.locator("h1").count() == 1
    assert page.locator("svg:not([role=img][aria-label])").count() == 0
    assert page.locator("th:not([scope])").count() == 0
    identifiers = page.evaluate("() => [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(identifiers) == len(set(identifiers))


def test_it_says_what_was_done_and_how_to_do_it_again(html, opened):
    text = opened(html("converted")).locator("body").inner_text()
    for word in ("residual.shortcut.1", "group_norm(groups=4)", "BatchNorm2d(64)"):
        assert word in text
    assert "normswap convert demo:digits \\\n  --to group_norm" in text
    assert (
        "built in Python, then Replace(group_norm)" in text
        and "model.onnx" in text
        and "Float32, for the target generic, opset" in text
    )


def test_the_worst_sites_come_first_where_there_are_too_many_to_draw(html, opened):
    page = opened(html("500 sites"))
    shown = page.evaluate(
        "() => [...document.querySelectorAll('td.number [data-figure*=snr_db]')]"
        ".map(each => JSON.parse(each.dataset.value))"
    )
    worst_first = {"NaN": -math.inf, None: math.inf}  # what cannot be compared comes last
    ratios = [float(worst_first.get(each, each)) for each in shown]
    assert len(ratios) == 500 and ratios == sorted(ratios)
    worst = page.locator('svg.wide[aria-label="The lowest of them"] text').all_text_contents()
    assert "blocks-1-norm" in worst and sum(each.startswith("blocks") for each in worst) == 10


def test_it_warns_of_random_weights_and_says_what_became_of_images(tmp_path, opened):
    told = {"weights": {"model": "random"}, "images": "resized to 8x8"}
    write_report(RewriteReport(model="m", plan=Plan(), **told), tmp_path)
    text = opened(tmp_path / "report.html").locator("header").inner_text()
    assert "RANDOM WEIGHTS" in text and "Images: resized to 8x8." in text


def test_it_shows_the_loss_of_each_step_and_the_distance_that_was_kept(html, opened):
    training = json.loads(html("converted").with_suffix(".json").read_text())["training"]
    assert [step for step, _ in training["losses"]] == [1, 2, 3, 4, 5]
    page = opened(html("converted"))
    assert page.locator('svg[aria-label="Loss of the training"]').count() == 2
    kept = next(
        i
        for i, (step, _) in enumerate(training["recovery"]["curve"])
        if step == training["recovery"]["step"]
    )
    assert page.locator(f'[data-figure="/training/recovery/curve/{kept}/1"]').count() == 2


def test_the_same_report_is_the_same_page():
    assert page(replaced(5)) == page(replaced(5))


def test_bars_are_as_long_as_their_values():
    """Read off the drawing: the width of each bar, and where the axis begins."""
    values = [30.0, 7.5, 0.0, -5.0, math.inf]
    drawing = bars("", [Bar(str(v), v, str(v)) for v in values])
    wide = drawing.partition('class="picture narrow')[0]
    drawn = re.findall(r'd="M (\S+) \S+ L (\S+) [^"]*"[^>]*fill: var\(--accent\)', wide)
    lengths = [float(end) - float(start) for start, end in drawn]
    assert [x / lengths[0] for x in lengths[:4]] == pytest.approx([1, 0.25, 0, -1 / 6], abs=1e-3)
    assert 1 < lengths[4] / lengths[0] < 1.2


def test_curves_go_through_their_points():
    """Read off the drawing: a straight line stays one, and the steps are as far apart as given."""
    points = [(0.0, 1.0), (1.0, 3.0), (3.0, 7.0), (4.0, math.inf)]
    drawing = curves("", [Curve("", points)], x="", y="", layouts=("wide",))
    (path,) = re.findall(r'd="([^"]*)" [^>]*stroke: var\(--accent\); stroke-width: 1.6', drawing)
    drawn = [tuple(map(float, each.split())) for each in re.findall(r"[\d.]+ [\d.]+", path)]
    assert len(drawn) == 3  # an infinity is nowhere
    (x0, y0), (x1, y1), (x2, y2) = drawn
    assert [(x2 - x0) / (x1 - x0), (y2 - y0) / (y1 - y0)] == pytest.approx([3, 3], abs=1e-3)
    assert x1 > x0 and y1 < y0
