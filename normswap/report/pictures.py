"""Pictures of a report as inline SVG: text stays text, and colors are variables of the page.

Each is drawn twice, for a wide and for a narrow screen; the style sheet shows one of them.
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
_COLORS = {"#000001": "--ink", "#000002": "--soft", "#000003": "--line", "#000004": "--accent"}
INK, SOFT, LINE, ACCENT = _COLORS
_WIDTHS = {"wide": 7.2, "narrow": 3.4}  # inches, of 72 points
_LETTERS = {"wide": 44, "narrow": 22}  # of a name
_ROW = 0.24  # inches
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


def bars(title: str, values: Sequence[Bar], *, unit: str = "", fractions: bool = False) -> Markup:
    """Horizontal bars, or where there are many of them points from left to right.

    Args:
        title: what a screen reader says.
        unit: of the axis.
        fractions: the axis ends with 1 and is labelled in percent.
    """
    draw = _draw_points if len(values) > MOST_NAMED else _draw_bars
    return Markup("").join(_both(title, values, unit, fractions, draw))


def _both(
    title: str, values: Sequence[Bar], unit: str, fractions: bool, draw: Callable[..., Any]
) -> list[Markup]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    drawn = []
    for layout, width in _WIDTHS.items():
        # The salt makes identifiers that are the same in every run, and in no two pictures.
        settings: Any = {
            "svg.fonttype": "none",
            "svg.hashsalt": f"{title} {layout}",
            "font.size": 9,
        }
        with rc_context(settings):
            figure = Figure(figsize=(width, 1), layout="constrained")
            draw(figure, figure.subplots(), values, layout, unit, fractions)
            text = io.StringIO()
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            figure.savefig(text, format="svg", transparent=True, metadata=nothing)
        drawn.append(_inline(text.getvalue(), title, layout, values))
    return drawn


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


def _inline(svg: str, title: str, layout: str, values: Sequence[Bar]) -> Markup:
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
                element.attrib |= values[int(row)].figure
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
