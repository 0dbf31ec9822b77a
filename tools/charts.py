"""The charts of the documentation, docs/charts/*.svg, drawn from figures that stand in docs/.

    python tools/charts.py [NAME ...]

Nothing is measured: docs/batch_size.json, docs/private.json and docs/zoo.csv are read, and tables
of docs/figures.md and docs/comparison.md. A chart has the colors of the report, in its light and in
its dark form.
"""

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

from markupsafe import Markup

import normswap
from normswap.report.pictures import Bar, Curve, bars, curves

DOCS = Path(__file__).parents[1] / "docs"
FIGURES = "figures.md"
STYLE = Path(normswap.__file__).parent / "report" / "templates" / "style.css"
IN_A_FILE = {"layouts": ("file",)}
STARTS = {
    "fix": "GroupNorm by Opacus",
    "plain": "GroupNorm, plain swap",
    "calibrated": "GroupNorm, calibrated",
    "recovered": "GroupNorm, recovered",
    "frozen": "BatchNorm, frozen",
    "folded": "BatchNorm, folded away",
}
EPSILON = "3"
RECOVERED = ("layer_norm", "group_norm, 4 groups", "group_norm, 8 groups", "filter_response_norm")


def batch_size() -> Markup:
    """Accuracy after fine-tuning against the batch size."""
    whole = json.loads((DOCS / "batch_size.json").read_text(encoding="utf-8"))
    found = {
        name: [(float(size), value) for size, value in points.items()]
        for name, points in whole["accuracy"].items()
    }
    sizes = [size for size, _ in next(iter(found.values()))]
    return curves(
        "Accuracy after fine-tuning against the batch size",
        [Curve(name, points) for name, points in found.items()],
        x="batch size",
        y="accuracy, %",
        ticks=sizes,
        powers=True,
        level=("before fine-tuning", whole["before"]),
        **IN_A_FILE,
    )


def private() -> Markup:
    """Accuracy after private training, by the start."""
    starts = json.loads((DOCS / "private.json").read_text(encoding="utf-8"))["starts"]
    means = {
        STARTS[name]: sum(found["accuracy"][EPSILON]) / len(found["accuracy"][EPSILON])
        for name, found in starts.items()
    }
    return _percents(f"Accuracy after private training, epsilon {EPSILON}", means)


def zoo() -> Markup:
    """What fold and torch's fuse leave of the BatchNorms of the model zoo."""
    with (DOCS / "zoo.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["error"]]
    every = [int(row["batch_norms"]) for row in rows]
    left = {
        "fold": [int(row["left"]) for row in rows],
        # A model on which fuse fails keeps all of its BatchNorms.
        "torch's fuse": [int(row["fuse_left"] or row["batch_norms"]) for row in rows],
    }
    shares = {f"BatchNorms folded, {k}": 1 - sum(v) / sum(every) for k, v in left.items()}
    shares |= {f"models with none left, {k}": v.count(0) / len(v) for k, v in left.items()}
    return _percents("BatchNorms folded", {name: 100 * share for name, share in shares.items()})


def peers() -> Markup:
    """The share of the BatchNorms of sixteen architectures that each tool leaves."""
    page = "comparison.md"
    names = columns("BatchNorms that are left", "", page)[1:]
    (row,) = (each for each in table("BatchNorms that are left", "", page) if each[0] == "all")
    every, *left = (int(cell.replace(",", "")) for cell in row[1:])
    shares = {name: 100 * count / every for name, count in zip(names[1:], left, strict=True)}
    return _percents(f"BatchNorms that are left, of {every:,}", shares)


def methods() -> Markup:
    """Accuracy after a swap and calibration, by method."""
    found: dict[str, float] = {}
    for figures, names in table("Methods", "calibrated, %"):
        values = [float(each) for each in re.findall(r"\d+\.\d", figures)]
        named = re.sub(r":.*|, nothing to fit", "", names).split(", ")
        if len(values) == 1:
            found[names.partition(":")[0] if "every" in names else named[0]] = values[0]
        else:
            found |= dict(zip(named, values, strict=True))
    return _percents("Accuracy of a ResNet-20 after a swap and calibration", found)


def result() -> Markup:
    """What a swap does to a pretrained ImageNet network, and what brings the accuracy back."""
    row = next(each for each in table("Recover", "") if each[0] == "the same, 300 steps")
    states = "original, BatchNorm", "LayerNorm, plain swap", "calibrated", "recovered"
    values = [float(each.split()[0]) for each in row[1:5]]
    title = "EfficientNet-Lite0, ImageNet images right"
    return _percents(title, dict(zip(states, values, strict=True)))


def recover() -> Markup:
    """Accuracy against the steps of recover, by method."""
    drawn = []
    for row in table("Recover", "ResNet-20, %, of 88.08"):
        if row[0] in RECOVERED:
            values = [float(row[column].split()[0]) for column in (1, 3, 5)]
            drawn.append(Curve(row[0], list(zip((0, 200, 800), values, strict=True))))
    return curves(
        "Accuracy against the steps of recover",
        drawn,
        x="steps of recover",
        y="accuracy, %",
        ticks=(0, 200, 800),
        level=("original", 88.08),
        **IN_A_FILE,
    )


def memory() -> Markup:
    """The most memory that a rewrite holds."""
    (row,) = table("Size and sites", "convert")
    names = columns("Size and sites", "convert")
    drawn = [Bar(name, float(each), each) for name, each in zip(names, row, strict=True)]
    return bars("Memory of each step", drawn, unit="times the bytes of the model", **IN_A_FILE)


CHARTS: dict[str, Callable[[], Markup]] = {
    each.__name__: each
    for each in (result, batch_size, private, zoo, peers, methods, recover, memory)
}


def _percents(title: str, values: dict[str, float]) -> Markup:
    drawn = [Bar(name, value / 100, f"{value:.1f} %") for name, value in values.items()]
    return bars(title, drawn, fractions=True, **IN_A_FILE)


def table(section: str, first: str, page: str = FIGURES) -> Iterator[list[str]]:
    """The rows of the table in a section of that page of docs/ whose head begins with `first`."""
    yield from _lines(section, first, page)[2:]


def columns(section: str, first: str, page: str = FIGURES) -> list[str]:
    """The head of that table."""
    return _lines(section, first, page)[0]


def _lines(section: str, first: str, page: str) -> list[list[str]]:
    text = (DOCS / page).read_text(encoding="utf-8")
    body = re.split(r"^## ", text.partition(f"\n## {section}\n")[2], maxsplit=1, flags=re.MULTILINE)
    found = re.search(rf"^\| {re.escape(first)} ?\|.*\n(\|.*\n)+", body[0], re.MULTILINE)
    if found is None:
        raise ValueError(f"docs/{page} has no table {first!r} under {section!r}")
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in found[0].splitlines()]


def write(name: str) -> None:
    """Draw docs/charts/NAME.svg."""
    root = ElementTree.fromstring(CHARTS[name]())
    root.set("xmlns", "http://www.w3.org/2000/svg")
    root.set("font-family", "system-ui, sans-serif")
    colors = ElementTree.Element("style")
    colors.text = STYLE.read_text(encoding="utf-8").partition("* {")[0]
    root.insert(0, colors)
    path = DOCS / "charts" / f"{name}.svg"
    path.write_text(ElementTree.tostring(root, encoding="unicode") + "\n", encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:] or CHARTS:
        write(name)
