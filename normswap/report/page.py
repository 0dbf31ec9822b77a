"""A report as a page: one HTML file that needs nothing else, made from the report alone.

Every figure on it carries the JSON pointer (RFC 6901) of its value in `report.json`.
"""

import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from markupsafe import Markup

from normswap.core.shown import shell_line, shown
from normswap.passes.edits.base import by_site
from normswap.report.measurements import Measurements
from normswap.report.outputs import SiteOutput
from normswap.report.pictures import MOST_NAMED, Bar, Curve, bars, curves

REPORT, PAGE = "report.json", "report.html"
WORST = 10  # sites that are named where there are too many to name all


class Report(Protocol):
    """What a page is of: the report of a rewrite, or of a comparison."""

    measurements: Measurements

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """The report as plain values (pydantic's)."""
        ...


def write_report(report: Report, folder: Path) -> None:
    """Write `report` to `folder`, for programs and for people."""
    (folder / REPORT).write_text(json.dumps(plain(report), indent=2) + "\n", encoding="utf-8")
    (folder / PAGE).write_text(page(report), encoding="utf-8")


def plain(report: Report) -> dict[str, Any]:
    """`report` as JSON has it: an infinity or a NaN, for which there is no number, is a word.

    pydantic's own JSON has no form for a path that is not UTF-8.
    """
    values: dict[str, Any] = _in_json(report.model_dump(mode="json"))
    return values


def _in_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _in_json(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_in_json(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def page(report: Report) -> str:
    """The HTML of `report`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    values = plain(report)
    environment = Environment(
        loader=PackageLoader("normswap.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else shown(value),
    )
    environment.globals["figure"] = lambda pointer, kind: figure(values, pointer, kind)
    environment.filters |= {"segment": _segment, "in_lines": _in_lines}
    plan = getattr(report, "plan", None)
    recipe = getattr(report, "recipe", None)
    places = {each.site: i for i, each in enumerate(report.measurements.sites)}
    changed = list(by_site(plan.edits)) if plan else []
    many = len(places) > MOST_NAMED
    if many:
        ratios = {each.site: _badness(each.snr_db) for each in report.measurements.sites}
        changed.sort(key=lambda each: ratios.get(each[0], math.inf))
    return environment.get_template("report.html").render(
        title=_title(values),
        done=_done(values),
        report=report,
        values=values,
        checks=_checks(values),
        changed=changed,
        many=many,
        left=_by_reason(plan.left) if plan else {},
        steps=[(edit.site, str(edit)) for edit in recipe.edits] if recipe else [],
        places=places,
        pictures={
            "sites": _sites(values),
            "worst": _worst(report.measurements.sites, values) if many else None,
            "accuracy": _accuracy(values),
            "losses": _losses(values),
            "recovery": _recovery(values),
        },
    )


def _title(values: Mapping[str, Any]) -> str:
    return f"{values['b']} against {values['a']}" if "b" in values else str(values["model"])


def _done(values: Mapping[str, Any]) -> str:
    """What was done, in a few words."""
    if "b" in values:
        return "two models compared"
    last = list(values["accuracy"])[-1:] if values["measured_on"] else []
    done = [*values["plan"]["passes"], *(state for state in last if not values["plan"]["passes"])]
    return ", ".join([*done, *(["ONNX"] if values["export"] else [])])


def _in_lines(command: str) -> Markup:
    """A command with each option on a line of its own, still one that a shell understands."""
    lines = map(shell_line, _before_options(shlex.split(command)))
    return Markup(" \\\n  ").join(lines)


def _before_options(words: Sequence[str]) -> list[list[str]]:
    lines: list[list[str]] = [[]]
    for word in words:
        if word.startswith("-"):
            lines.append([])
        lines[-1].append(word)
    return lines


def _checks(values: Mapping[str, Any]) -> list[str]:
    """What was checked, in words."""
    checks = []
    if values.get("allowed") is not None:
        checks.append("the outputs of the original and the result")
    if (values.get("export") or {}).get("validation"):
        checks.append("the ONNX file in ONNX Runtime against torch")
    return checks


def figure(values: Mapping[str, Any], pointer: str, kind: str) -> Markup:
    """The value at `pointer` as people read it, with where it is from and what it is exactly."""
    where = Markup(" ").join(
        Markup('{}="{}"').format(*each) for each in _attributes(values, pointer).items()
    )
    shown = _FORMATS[kind](_look_up(values, pointer))
    return Markup("<span {}>{}</span>").format(where, shown)


def _attributes(values: Mapping[str, Any], pointer: str) -> dict[str, str]:
    """The pointer as it is, or where that cannot be seen as a URI fragment (RFC 6901, 6)."""
    whole = shown(pointer, len(pointer))
    where = pointer if whole == pointer else f"#{quote(pointer, errors='surrogatepass')}"
    return {"data-figure": where, "data-value": json.dumps(_look_up(values, pointer))}


def _look_up(values: Any, pointer: str) -> Any:
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        values = values[int(key) if isinstance(values, list) else key]
    return values


def _segment(key: Any) -> str:
    """`key` as a part of a JSON pointer."""
    return str(key).replace("~", "~0").replace("/", "~1")


def _number(write: Callable[[float], str]) -> Callable[[Any], str]:
    def written(value: Any) -> str:
        if value is None:
            return "\N{EN DASH}"
        number = float(value)  # infinities and NaN are words in the JSON
        if math.isnan(number):
            return "NaN"
        return (
            write(number) if math.isfinite(number) else ("∞" if number > 0 else "\N{MINUS SIGN}∞")
        )

    return written


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


_FORMATS: dict[str, Callable[[Any], str]] = {
    "percent": _number(lambda x: f"{x:.2%}"),
    "decibels": _number(lambda x: f"{x:.1f} dB".replace("-", "\N{MINUS SIGN}")),
    "milliseconds": _number(lambda x: f"{x:#.3g} ms" if x < 99.95 else f"{x:,.0f} ms"),
    "seconds": _number(lambda x: f"{x:,.0f} s"),
    "bytes": _number(_bytes),
    "count": _number(lambda x: f"{x:,.0f}"),
    "short": _number(lambda x: f"{x:.2g}"),
}


def _by_reason(left: Sequence[Any]) -> dict[str, list[str]]:
    sites: dict[str, list[str]] = {}
    for each in left:
        sites.setdefault(each.reason, []).append(each.site)
    return sites


def _badness(ratio: float | None) -> float:
    """What puts the worst sites first, and those last that cannot be compared."""
    if ratio is None:
        return math.inf
    return -math.inf if math.isnan(ratio) else ratio


def _sites(values: Mapping[str, Any]) -> Markup | None:
    found = values["measurements"]["sites"]
    drawn = [_ratio(values, i) for i in range(len(found))]
    if len(drawn) < 2 or not any(bar.value is not None for bar in drawn):
        return None  # the output alone is in the summary
    return bars("Signal-to-noise ratio of each site's output", drawn, unit="dB")


def _worst(sites: Sequence[SiteOutput], values: Mapping[str, Any]) -> Markup:
    comparable = [i for i, each in enumerate(sites) if each.snr_db is not None]
    worst = sorted(comparable, key=lambda i: _badness(sites[i].snr_db))[:WORST]
    return bars("The lowest of them", [_ratio(values, i) for i in worst], unit="dB")


def _ratio(values: Mapping[str, Any], place: int) -> Bar:
    name = values["measurements"]["sites"][place]["site"] or "output"
    return _bar(values, name, f"/measurements/sites/{place}/snr_db", "decibels")


def _accuracy(values: Mapping[str, Any]) -> Markup | None:
    drawn = [
        _bar(values, state, f"/accuracy/{_segment(state)}", "percent")
        for state in values["accuracy"]
    ]
    if len(drawn) < 2:
        return None
    return bars("Accuracy of each state", drawn, fractions=True)


def _losses(values: Mapping[str, Any]) -> Markup | None:
    found = (values.get("training") or {}).get("losses", [])
    if len(found) < 2:
        return None
    points = [(step, float(loss)) for step, loss in found]
    return curves("Loss of the training", [Curve("", points)], x="step", y="loss")


def _recovery(values: Mapping[str, Any]) -> Markup | None:
    recovery = (values.get("training") or {}).get("recovery")
    if recovery is None:
        return None
    points = [(step, float(distance)) for step, distance in recovery["curve"]]
    named = {
        i: _bar(values, f"step {step}", f"/training/recovery/curve/{i}/1", "short")
        for i, (step, distance) in enumerate(points)
        if step in (0, recovery["step"]) and math.isfinite(distance)
    }
    title = "Distance of the outputs on held-back batches"
    return curves(title, [Curve("", points, named)], x="step", y="distance")


def _bar(values: Mapping[str, Any], name: str, pointer: str, kind: str) -> Bar:
    value = _look_up(values, pointer)
    return Bar(
        name,
        None if value is None else float(value),
        "not comparable" if value is None else _FORMATS[kind](value),
        _attributes(values, pointer),
    )
