"""What a model normalizes, and what a fold could do with it: the answer of `inspect`."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from glob import escape
from typing import Any

from rich.console import RenderableType
from torch import nn
from torch.export import ExportedProgram

from normswap.core.ambient import usual_settings
from normswap.core.errors import NormswapError, Unsupported
from normswap.core.results import Result
from normswap.core.terminal import site_name, site_tables, words
from normswap.core.types import Inputs
from normswap.graph.capture import How, capture, captures_kept
from normswap.graph.propagation.affines import Affines
from normswap.graph.sites import NormSite, find_sites
from normswap.graph.supported import check_supported
from normswap.passes.fold import Fold
from normswap.passes.plan import plan
from normswap.source.program import opened


@dataclass(frozen=True, repr=False)
class Inspection(Result):
    """What `inspect` saw; it iterates over the sites, and `inspection["layer1.0.bn1"]` is one.

    Attributes:
        sites: the normalizations, in order of execution where the graph is known.
        how: how the model was captured.
        unseen: path -> reason, for what could not be captured.
        folds: site name -> what a fold would fold it into, or why it cannot be folded.
        foldable: names of the sites that a fold removes.
    """

    sites: tuple[NormSite, ...]
    how: How
    unseen: dict[str, str]
    folds: dict[str, str]
    foldable: frozenset[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "captured": self.how,
            "unseen": self.unseen,
            "summary": {
                "sites": len(self.sites),
                "by_kind": dict(Counter(site.kind for site in self.sites)),
                "parameters": sum(site.parameters for site in self.sites),
                "depend_on_the_batch": [s.name for s in self.sites if s.statistics == "batch"],
                "batch_norm_in_training": [s.name for s in self.sites if s.depends_on_batch],
                "foldable": len(self.foldable),
            },
            "sites": [
                {
                    **{k: v for k, v in site.to_dict().items() if k != "executions"},
                    "foldable": site.name in self.foldable,
                    "fold": self.folds.get(site.name),
                }
                for site in self.sites
            ],
        }

    def entries(self) -> tuple[NormSite, ...]:
        """The sites."""
        return self.sites

    def summary(self) -> str:
        """How many normalizations of which kind there are, and how many a fold removes."""
        kinds = Counter(site.kind for site in self.sites)
        found = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "none"
        noun = "normalization" if len(self.sites) == 1 else "normalizations"
        return f"{len(self.sites)} {noun} ({found}), of which a fold removes {len(self.foldable)}"

    def tables(self, *, whole: bool = False) -> list[RenderableType]:
        """The summary, then one row for each normalization.

        Args:
            whole: list every one, however many there are.
        """
        rows = [
            (
                site_name(site.name),
                words(site.cls),
                words(_shape(site)),
                words(site.statistics),
                words(_known(site.calls)),
                words(f"into {self.folds[site.name]}", "green")
                if site.name in self.foldable
                else words(self.folds.get(site.name, ""), "yellow"),
            )
            for site in self.sites
        ]
        columns = ("site", "class", "input", "stats", "calls", "fold")
        told = ("class", "stats", "fold")
        return [*_summary(self), *site_tables(columns, rows, whole=whole, told=told)]


@usual_settings()
def inspect(model: nn.Module | ExportedProgram, inputs: Inputs | None = None) -> Inspection:
    """Find every normalization of `model`, and what a fold could do with it.

    Args:
        inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs. Without it
            shapes, and much of the dataflow, stay unknown; a program comes with its own.

    The model is not changed. While it is looked at, though, it is in eval mode, and some attributes
    of its modules are others: a forward of the same model in another thread has to wait until this
    returns. Other models run meanwhile as always.

    Raises:
        NormswapError: the model is scripted or quantized, or does not run on `inputs`.

    Examples:
        >>> import normswap
        >>> from normswap.demo.digits import digits, digits_data
        >>> model, images = digits(), digits_data("train")[0]
        >>> found = normswap.inspect(model, images[:2])
        >>> len(found.sites), found.sites[0].name
        (8, 'stem.0.1')
    """
    model, inputs = opened(model, inputs)
    check_supported(model, lazy=True)
    with captures_kept():
        return _inspected(model, inputs)


def _inspected(model: nn.Module, inputs: Any) -> Inspection:
    seen = capture(model, inputs)
    sites = find_sites(seen)
    folds: dict[str, str] = {}
    foldable: set[str] = set()
    affines = Affines(seen, sites)
    for inverse in (False, True):
        for site in sites:
            if not (site.kind == "batch" or site.has_fixed_affine) or site.name in foldable:
                continue
            try:
                found = affines.absorbers(site, inverse=inverse)
            except Unsupported as reason:
                folds.setdefault(site.name, str(reason))
                continue
            folds[site.name] = ", ".join(dict.fromkeys(absorber.path for absorber in found))
            foldable.add(site.name)
            affines.moved(site, found)
    # What a fold left normalizes nothing.
    sites = tuple(site for site in sites if site.kind != "affine")
    planned = _planned(model, inputs, [s.name for s in sites if s.kind == "batch" and not s.paths])
    folds |= planned
    foldable |= {name for name, into in planned.items() if not into.startswith(_STAYS)}
    return Inspection(sites, seen.how, dict(seen.unseen), folds, frozenset(foldable))


_STAYS = "stays: "


def _planned(model: nn.Module, inputs: Any, names: Sequence[str]) -> dict[str, str]:
    """As `Inspection.folds`, for calls that no module owns: a fold gives each one first."""
    try:
        decided = plan(model, Fold(include=[*map(escape, names)]), inputs=inputs) if names else None
    except NormswapError:  # none is frozen, say
        decided = None
    if decided is None:
        return {}
    found = {each.site: f"{_STAYS}{each.reason}" for each in decided.left}
    for name in names:
        edits = [edit for edit in decided.edits if edit.site == name]
        into = [edit.path for edit in edits if edit.effect == "carries"]
        if any(edit.effect == "removes" for edit in edits):
            found[name] = ", ".join(dict.fromkeys(into))
        for edit in edits:
            if edit.effect == "leaves":
                found[name] = edit.reason
    return {name: told for name, told in found.items() if name in names}


_HOW = {
    "export": "captured with torch.export",
    "submodules": "captured in parts with torch.export",
    "symbolic_trace": "traced with torch.fx, which knows no shapes; give inputs (--input)",
    "module tree": "read from the tree of modules alone; give inputs (--input) to capture it",
}


def _summary(inspection: Inspection) -> list[RenderableType]:
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
        f"use batch statistics: {len(live)} in training, {len(always)} in eval",
        f"can be folded: {len(inspection.foldable)} of {len(batch)}",
        *(f"  {count} not: {reason}" for reason, count in reasons.most_common(5)),
        _HOW[inspection.how],
        *(f"  not captured: {path or '(model)'}: {why}" for path, why in inspection.unseen.items()),
    ]
    return [words(line) for line in lines]


def _shape(site: NormSite) -> str:
    return "x".join(map(str, site.input_shape or ("?", _known(site.num_features), "...")))


def _known(value: int | None) -> str:
    return "?" if value is None else str(value)
