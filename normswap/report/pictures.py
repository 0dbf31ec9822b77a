"""Pictures of a report as inline SVG: text stays text, and colors are variables of the page.

Each is drawn twice, for a wide and for a narrow screen; the style sheet shows one of them. The
charts of the documentation are drawn by the same functions, once, for any screen.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree

from markupsafe import Markup

from normswap.core.shown import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What is drawn in these is shown in the color of the variable.
_COLORS = {
    "#000001": "--ink",
    "#000002": "--soft",
    "#000003": "--line",
    "#000004": "--accent",
    "#000005": "--second",
    "#000006": "--third",
    "#000007": "--fourth",
}
INK, SOFT, LINE, ACCENT, *_OTHERS = _COLORS
# The curves of a chart differ in color, marker and dashes.
_CURVES = tuple(zip((ACCENT, *_OTHERS), "osvD", ("-", "--", "-.", ":"), strict=True))
_WIDTHS = {"wide": 7.2, "narrow": 3.4, "file": 5.0}  # inches, of 72 points
_LETTERS = {"wide": 44, "narrow": 22, "file": 36}  # of a name
_ROW = 0.24  # inches
ON_A_PAGE = ("wide", "narrow")
MOST_NAMED = 40  # with more sites than that, they are points without a name


class Bar(NamedTuple):
    """One value of a picture.

    Attributes:
        name: what it is of.
        value: None where there is none.
        text: what is written beside it.
        figure: attributes of that text, where it stands in the report.
    """

    name: str
    value: float | None
    text: str
    figure: Mapping[str, str] = {}


class Curve(NamedTuple):
    """One curve of a picture.

    Attributes:
        name: what it is of; "" where there is no other.
        points: (x, y), from left to right.
        named: points that are written beside the curve, as the name of a `Bar` is not.
    """

    name: str
    points: Sequence[tuple[float, float]]
    named: Mapping[int, Bar] = {}


def bars(
    title: str,
    values: Sequence[Bar],
    *,
    unit: str = "",
    fractions: bool = False,
    layouts: Sequence[str] = ON_A_PAGE,
) -> Markup:
    """Horizontal bars, or where there are many of them points from left to right.

    Args:
        title: what a screen reader says.
        unit: of the axis.
        fractions: the axis ends with 1 and is labelled in percent.
        layouts: which of them are drawn: for a page, or for a file.
    """
    draw = _draw_points if len(values) > MOST_NAMED else _draw_bars
    marked = dict(enumerate(value.figure for value in values))

    def on(figure: "Figure", axes: "Axes", layout: str) -> None:
        draw(figure, axes, values, layout, unit, fractions)

    return _drawn(title, layouts, marked, on)


def curves(
    title: str,
    values: Sequence[Curve],
    *,
    x: str,
    y: str,
    ticks: Sequence[float] = (),
    powers: bool = False,
    level: tuple[str, float] | None = None,
    layouts: Sequence[str] = ON_A_PAGE,
) -> Markup:
    """Curves over one axis, at most four, with a legend where they are several.

    Args:
        title: what a screen reader says.
        x, y: what the axes are of.
        ticks: where the axis of x has numbers; by default where matplotlib puts them.
        powers: the axis of x is logarithmic, to base 2.
        level: a dotted line across, and its name.
        layouts: which of them are drawn: for a page, or for a file.
    """
    marked = {place: bar.figure for curve in values for place, bar in curve.named.items()}

    def on(figure: "Figure", axes: "Axes", layout: str) -> None:
        figure.set_figheight(2.5 if len(values) == 1 else 3.2)
        _draw_curves(axes, values, level)
        if powers:
            axes.set_xscale("log", base=2)
        if ticks:
            axes.set_xticks(ticks, [f"{each:g}" for each in ticks])
            axes.minorticks_off()
        axes.set_xlabel(x, color=SOFT)
        axes.set_ylabel(y, color=SOFT)
        if len(values) > 1:
            columns = 1 if layout == "narrow" else 2
            figure.legend(loc="outside upper left", ncols=columns, frameon=False, labelcolor=INK)
        _plain(axes, "y")

    return _drawn(title, layouts, marked, on)


def _drawn(
    title: str,
    layouts: Sequence[str],
    marked: Mapping[int, Mapping[str, str]],
    draw: Callable[["Figure", "Axes", str], None],
) -> Markup:
    """The picture in each of `layouts`; `marked` are attributes of the texts that have a place."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    drawn = []
    for layout in layouts:
        # The salt makes identifiers that are the same in every run, and in no two pictures.
        settings: Any = {
            "svg.fonttype": "none",
            "svg.hashsalt": f"{title} {layout}",
            "font.size": 9,
        }
        with rc_context(settings):
            figure = Figure(figsize=(_WIDTHS[layout], 1), layout="constrained")
            draw(figure, figure.subplots(), layout)
            text = io.StringIO()
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            figure.savefig(text, format="svg", transparent=True, metadata=nothing)
        drawn.append(_inline(text.getvalue(), title, layout, marked))
    return Markup("").join(drawn)


def _draw_bars(
    figure: "Figure", axes: "Axes", values: Sequence[Bar], layout: str, unit: str, fractions: bool
) -> None:
    figure.set_figheight(0.5 + _ROW * len(values))
    finite = [bar.value for bar in values if bar.value is not None and math.isfinite(bar.value)]
    # What is infinite ends a little behind the largest that is not.
    top = 1.0 if fractions else max([*finite, 1.0]) * (1.0 if all(map(_finite, values)) else 1.1)
    low = min([*finite, 0.0])
    lengths = [_within(bar.value, low, top) for bar in values]
    rows = range(len(values))
    axes.barh(rows, lengths, height=0.62, color=ACCENT, linewidth=0)
    names = [shown(bar.name, _LETTERS[layout]) for bar in values]
    axes.set_yticks(rows, names, color=INK, parse_math=False)
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_xlim(low, low + (top - low) * (1.14 if layout == "wide" else 1.36))
    for row, (bar, length) in enumerate(zip(values, lengths, strict=True)):
        axes.annotate(
            bar.text,
            (max(length, 0), row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=INK if bar.value is not None else SOFT,
            parse_math=False,
            gid=f"value-{row}",
        )
    axes.set_xlabel(unit, color=SOFT)
    if fractions:
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_xticks([0, 0.5, 1])
    _plain(axes, "x")


def _draw_points(
    figure: "Figure", axes: "Axes", values: Sequence[Bar], layout: str, unit: str, fractions: bool
) -> None:
    figure.set_figheight(2.6)
    drawn = [
        (place, bar.value)
        for place, bar in enumerate(values)
        if bar.value is not None and not math.isnan(bar.value)
    ]
    finite = [value for _, value in drawn if math.isfinite(value)]
    top, low = max([*finite, 1.0]) * 1.1, min([*finite, 0.0])
    heights = [_within(value, low, top) for _, value in drawn]
    axes.plot([place for place, _ in drawn], heights, ".", markersize=4, color=ACCENT)
    axes.set_xlim(-1, len(values))
    axes.set_ylim(low - top * 0.03, top * 1.03)
    axes.set_xlabel(f"{len(values)} sites, in order", color=SOFT)
    axes.set_ylabel(unit, color=SOFT)
    if drawn:
        lowest = values[min(drawn, key=lambda each: each[1])[0]]
        words = f"lowest: {shown(lowest.name, _LETTERS[layout])}, {lowest.text}"
        axes.set_title(words, loc="left", fontsize=9, color=INK, parse_math=False)
    _plain(axes, "y")


def _draw_curves(axes: "Axes", values: Sequence[Curve], level: tuple[str, float] | None) -> None:
    if level is not None:
        name, height = level
        axes.axhline(height, color=SOFT, linestyle=(0, (1, 2)), linewidth=1)
        axes.annotate(
            name,
            (1, height),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            color=SOFT,
            parse_math=False,
        )
    for curve, (color, marker, dashes) in zip(values, _CURVES, strict=False):
        points = [each for each in curve.points if math.isfinite(each[1])]
        style: dict[str, Any] = {"color": color, "linestyle": dashes, "linewidth": 1.6}
        if len(points) <= MOST_NAMED:
            style |= {"marker": marker, "markersize": 4}
        axes.plot([x for x, _ in points], [y for _, y in points], label=curve.name, **style)
        for place, bar in curve.named.items():
            axes.annotate(
                bar.text,
                curve.points[place],
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                color=INK,
                parse_math=False,
                gid=f"value-{place}",
            )
    axes.margins(x=0.06, y=0.16)


def _plain(axes: "Axes", along: Any) -> None:
    """Nothing but a thin grid under the values."""
    axes.set_axisbelow(True)
    axes.grid(axis=along, color=LINE, linewidth=0.8)
    axes.tick_params(length=0, colors=SOFT, labelsize=9)
    if along == "x":
        axes.tick_params(axis="y", labelcolor=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _finite(bar: Bar) -> bool:
    return bar.value is None or math.isfinite(bar.value)


def _within(value: float | None, low: float, top: float) -> float:
    if value is None or math.isnan(value):
        return 0.0
    return min(max(value, low), top)


def _inline(svg: str, title: str, layout: str, marked: Mapping[int, Mapping[str, str]]) -> Markup:
    """The `svg` element alone, its colors and font those of the page."""
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = element.attrib.items()
        element.attrib = {_local(name): " ".join(value.split()) for name, value in attributes}
        for child in list(element):
            if _local(child.tag) in ("style", "metadata"):
                element.remove(child)
        if "style" in element.attrib:
            element.set("style", _styled(element.attrib["style"]))
        if element.tag == "g":  # a part of the drawing; nothing refers to it
            kind, _, row = element.attrib.pop("id", "").partition("-")
            if kind == "value":
                element.attrib |= marked[int(row)]
    size = {"viewBox": root.attrib["viewBox"]}
    root.attrib = {"class": f"picture {layout}", "role": "img", "aria-label": title, **size}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _local(name: str) -> str:
    """Without its namespace, which HTML knows."""
    return name.rpartition("}")[2]


def _styled(style: str) -> str:
    style = re.sub(r"font-family: [^;]*; ", "", style)
    for color, variable in _COLORS.items():
        style = style.replace(color, f"var({variable})")
    return style
