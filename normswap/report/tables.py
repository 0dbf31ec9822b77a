"""Tables for the terminal: of the normalizations of a model, of a plan, of the methods."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from typing import TYPE_CHECKING

from rich.console import RenderableType

from normswap.core.shown import LONGEST_NAME
from normswap.core.terminal import PlainConsole, PlainTable, words

if TYPE_CHECKING:
    from normswap.graph.inspection import Inspection
    from normswap.graph.sites import NormSite
    from normswap.norms.registry import Method
    from normswap.passes.edits import Edit
    from normswap.passes.plan import Plan

METHOD_FACTS = (
    "kind", "keeps", "summary", "formula", "source", "statistics", "batch_independent", "cost",
    "onnx", "options", "swap", "needs_running", "folds_scale",
)  # fmt: skip

WHOLE = "(model)"  # for the name of a site that is the whole model, ""
_TEXT_WIDTH = 140
# Edits that carry out what another of the same site says, and refer to it for the reason.
_STEPS = frozenset({
    "give_bias", "give_call_bias", "fold_into_tensor", "release", "bake", "parametrize", "identity",
    "drop_gain", "drop_input_affine", "take_raw_input", "bypass",
})  # fmt: skip
# A narrow terminal breaks reasons, between words, before it breaks one of these.
_WHOLE = ("site", "input", "method", "keeps")


def to_text(*parts: RenderableType) -> str:
    """`parts` as plain text, for `print`."""
    buffer = StringIO()
    console = PlainConsole(file=buffer, width=_TEXT_WIDTH, color_system=None)
    for part in parts:
        console.print(part)
    return buffer.getvalue().rstrip()


def inspection_table(inspection: "Inspection") -> list[RenderableType]:
    """One row for each normalization, then the summary."""
    table = _table("site", "class", "input", "stats", "calls", "fold")
    for site in inspection.sites:
        table.add_row(
            _site(site.name),
            site.cls,
            "x".join(map(str, site.input_shape or ("?", _known(site.num_features), "..."))),
            site.statistics,
            _known(site.calls),
            _fold_cell(inspection, site),
        )
    return [table, *_summary(inspection)]


def _fold_cell(inspection: "Inspection", site: "NormSite") -> RenderableType:
    if site.name in inspection.foldable:
        return words(f"into {inspection.folds[site.name]}", "green")
    return words(inspection.folds.get(site.name, ""), "yellow")


def _summary(inspection: "Inspection") -> list[RenderableType]:
    sites = inspection.sites
    kinds = Counter(site.kind for site in sites)
    batch = [site for site in sites if site.kind == "batch"]
    live = [site for site in sites if site.depends_on_batch]
    always = [site for site in sites if site.statistics == "batch"]
    reasons = Counter(
        inspection.folds[site.name] for site in batch if site.name not in inspection.foldable
    )
    lines = [
        f"{len(sites)} normalizations: "
        + (", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "none"),
        f"{sum(site.parameters for site in sites):,} parameters",
        f"depend on the batch: {len(live)} in training, {len(always)} in eval mode too",
        f"can be folded: {len(inspection.foldable)} of {len(batch)}",
        *(f"  {count} not: {reason}" for reason, count in reasons.most_common(5)),
        f"seen by: {inspection.how}",
        *(f"  not captured: {path or '(model)'}: {why}" for path, why in inspection.unseen.items()),
    ]
    return [words(line) for line in lines]


def plan_table(plan: "Plan") -> list[RenderableType]:
    """One row for each site: what will be done and why, or why it is left."""
    table = _table("site", "what", "why")
    for row in plan_rows(plan):
        table.add_row(_site(row[0]), *row[1:])
    for left in plan.left:
        table.add_row(_site(left.site), words("left", "yellow"), left.reason)
    count = f"{len(plan.changed)} sites change, {len(plan.left)} are left"
    if plan.edits and not plan.checked:
        count += "; unchecked: with example inputs the result is run beside the model"
    return [table, words(count)]


def plan_rows(plan: "Plan") -> Iterator[tuple[str, str, str]]:
    """For each site that changes its name, what will be done and why."""
    edits: dict[str, list[Edit]] = {}
    for edit in plan.edits:
        edits.setdefault(edit.site, []).append(edit)
    for site, each in edits.items():
        yield site, _in_short(each), _why(each)


def _why(edits: Sequence["Edit"]) -> str:
    """The last decision: a functional call that got a module is folded, or stays, for a reason."""
    return ([edit for edit in edits if edit.edit not in _STEPS] or edits)[-1].reason


def _in_short(edits: Sequence["Edit"]) -> str:
    carriers = dict.fromkeys(edit.path for edit in edits if edit.edit == "fold_into_tensor")
    added = [edit for edit in edits if edit.edit in ("replace_by_centering", "parametrize")]
    if added:
        return "; ".join(dict.fromkeys(str(edit) for edit in added))
    if carriers:
        first = [
            str(edit)
            for edit in edits
            if edit.edit in ("modularize_batch_norm", "modularize_norm", "replace")
        ]
        removed = any(edit.edit in ("identity", "shift") for edit in edits)
        into = f"{'fold' if removed else 'move'} into {', '.join(carriers)}"
        return "; ".join([*first, into, *(str(edit) for edit in edits if edit.edit == "shift")])
    return "; ".join(dict.fromkeys(str(edit) for edit in edits))


def methods_tables(methods: Mapping[str, "Method"]) -> list[RenderableType]:
    """For each kind, one row for each method."""
    parts: list[RenderableType] = []
    for kind in dict.fromkeys(method.kind for method in methods.values()):
        table = _table("method", "keeps", "what it is", "options")
        for name, method in methods.items():
            if method.kind == kind:
                table.add_row(name, method.keeps, method.summary, ", ".join(method.options))
        parts += [words(f"{kind} methods", "bold"), table, words("")]
    return parts[:-1]


def invariances_table(found: Mapping[str, Mapping[str, bool]]) -> PlainTable:
    """One row for each method, one column for each change that it may not see."""
    columns = next(iter(found.values()), {})
    table = _table("method")
    for column in columns:
        heading = _in_few_letters(column)
        table.add_column(heading, min_width=max(map(len, heading.split())))
    for name, stays in found.items():
        cells = {True: words("yes", "green"), False: words("no")}
        table.add_row(name, *(cells[stays[column]] for column in columns))
    return table


def _in_few_letters(change: str) -> str:
    short = {"re-scaling": "scaled", "re-centering": "shifted", "dataset": "data", "training": ""}
    return " ".join(short.get(word, word) for word in change.split())


def facts_table(title: str, facts: Sequence[tuple[str, str]]) -> PlainTable:
    """Names and values, for the result of a command."""
    table = PlainTable(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, value)
    return table


def _table(*columns: str) -> PlainTable:
    table = PlainTable(header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in _WHOLE)
    return table


def _site(name: str) -> RenderableType:
    return words(name or WHOLE, longest=LONGEST_NAME)


def _known(value: int | None) -> str:
    return "?" if value is None else str(value)
