"""What advice rests on: what `inspect` sees, and what each rewrite would do with the model."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from normswap.core.errors import NormswapError
from normswap.fit.batch import logits_of
from normswap.graph.running import check_runs
from normswap.graph.sites import NormSite
from normswap.passes import AbsorbInput, Center, Fold, Replace
from normswap.passes.inspection import Inspection, inspect
from normswap.passes.plan import Pass, Plan, plan
from normswap.report.advice.measured import Measured
from normswap.report.advice.suggestion import Use
from normswap.report.latency import Cost, cost_of
from normswap.source.preprocessing import IMAGENET_MEAN, IMAGENET_STD

FOLDED = ("batch", "decorrelated_batch")  # the kinds that a fold removes
# Kinds that compute no statistics of what they are given, in eval mode.
WITHOUT_STATISTICS = (*FOLDED, "conditional_batch_norm", "affine", "pointwise", "input")


@dataclass(frozen=True)
class Findings:
    """Facts of a model; a plan is None where no rule asks for it, or the pass refuses.

    Attributes:
        inspection: what `inspect` saw.
        refused: why a plan is missing, by the name of the pass.
        fold, center, group_norm: what these would do.
        raw: the layers that would fold in the normalization of the input; None: nothing can.
        cost: of a forward pass; None without inputs.
        measured: what data told.
        with_inputs: whether example inputs were at hand.
        untrained: how many BatchNorms have the statistics of a new model, mean 0 and variance 1.
    """

    inspection: Inspection
    refused: dict[str, str]
    fold: Plan | None = None
    center: Plan | None = None
    group_norm: Plan | None = None
    raw: str | None = None
    cost: Cost | None = None
    measured: Measured | None = None
    with_inputs: bool = True
    untrained: int = 0

    @property
    def sites(self) -> tuple[NormSite, ...]:
        return self.inspection.sites

    @property
    def batch(self) -> tuple[NormSite, ...]:
        """The BatchNorms, whitening ones included."""
        return tuple(site for site in self.sites if site.kind in FOLDED)

    @property
    def live(self) -> tuple[NormSite, ...]:
        """Those whose output for a sample depends on the others in training."""
        return tuple(site for site in self.sites if site.depends_on_batch)

    @property
    def always(self) -> tuple[NormSite, ...]:
        """Those for which it does in eval mode too."""
        return tuple(site for site in self.sites if site.statistics == "batch")

    @property
    def at_run_time(self) -> tuple[NormSite, ...]:
        """Those that compute statistics of each sample in eval mode, some beside running ones."""
        return tuple(
            site
            for site in self.sites
            if site.kind not in WITHOUT_STATISTICS
            and site.statistics in ("sample", "running")
            and not site.has_fixed_affine
        )

    @property
    def stay(self) -> dict[str, str]:
        """BatchNorms of which a fold leaves a scale and shift, or a shift, with the reason."""
        edits = self.fold.edits if self.fold else ()
        kept = [edit for edit in edits if edit.effect == "leaves"]
        return {edit.site: edit.reason.removeprefix("stays: ") for edit in kept}

    @property
    def unfolded(self) -> dict[str, str]:
        """BatchNorms that a fold leaves as they are, with the reason."""
        names = {site.name for site in self.batch}
        left = self.fold.left if self.fold else ()
        frozen = [e for e in self.fold.edits if e.edit == "freeze"] if self.fold else []
        stay = {e.site: e.reason for e in frozen if not e.folded}
        return stay | {each.site: each.reason for each in left if each.site in names}

    @property
    def gone(self) -> int:
        """How many BatchNorms a fold removes."""
        return len(self.batch) - len(self.stay) - len(self.unfolded) if self.fold else 0

    @property
    def exports(self) -> bool:
        return self.with_inputs and self.inspection.how == "export"

    @property
    def classifies(self) -> bool:
        """Whether it returns logits, as far as that is known."""
        return self.cost is None or logits_of(self.cost.output) is not None

    @property
    def groups(self) -> dict[int, int]:
        """Number of groups -> how many sites would have it as GroupNorms."""
        edits = self.group_norm.edits if self.group_norm else ()
        options = [edit.options for edit in edits if edit.edit == "replace"]
        return dict(Counter(each["groups"] for each in options).most_common())

    def to_dict(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        cost, measured = self.cost, self.measured
        return {
            "normalizations": dict(Counter(site.kind for site in self.sites)),
            "depend_on_the_batch_in_training": len(self.live),
            "depend_on_the_batch_in_eval": [site.name for site in self.always],
            "fold": self.fold
            and {"gone": self.gone, "scale_and_shift": self.stay, "left": self.unfolded},
            "center": self.center
            and {"changed": len(freed(self.center)), "left": len(self.center.left)},
            "groups": {str(groups): sites for groups, sites in self.groups.items()},
            "share_of_forward": cost and round(cost.share, 3),
            "seconds_of_forward": cost and cost.seconds,
            "device": cost and cost.device,
            "measured": measured and measured.to_dict(),
            "refused": self.refused,
        }


def freed(centered: Plan) -> tuple[str, ...]:
    """The LayerNorms that become RMSNorms in a plan of `Center`."""
    return tuple(edit.site for edit in centered.edits if edit.edit == "replace")


def find(
    model: nn.Module,
    inputs: Any,
    use: Use,
    measure: Callable[[nn.Module, Inspection, float], Measured] | None = None,
) -> Findings:
    """Look at `model`, which stays as it is, as far as advice for `use` needs it.

    Args:
        measure: what to learn from data, given the seconds of a sample, 0 where unknown.

    Raises:
        NormswapError: the model does not run on `inputs`, or cannot be looked at.
    """
    if inputs is not None:
        check_runs(model, inputs)
    inspection = inspect(model, inputs)
    kinds = {site.kind for site in inspection.sites}
    live = any(site.depends_on_batch for site in inspection.sites)
    refused: dict[str, str] = {}

    def decide(each: Pass, wanted: bool) -> Plan | None:
        if not wanted:
            return None
        try:
            return plan(model, each, inputs=inputs)
        except NormswapError as error:
            refused[type(each).__name__] = str(error)
            return None

    deploys = use.target is not None or not use.trains
    always = any(site.statistics == "batch" for site in inspection.sites)
    raw = decide(
        AbsorbInput(IMAGENET_MEAN, IMAGENET_STD), use.target == "edge" and _takes_images(inputs)
    )
    cost = None
    if inputs is not None and inspection.sites:
        cost = cost_of(model, inputs, [site.name for site in inspection.sites])
    seconds = cost.seconds / _samples(inputs) if cost else 0.0
    return Findings(
        inspection=inspection,
        refused=refused,
        fold=decide(Fold(), bool(kinds.intersection(FOLDED)) and (deploys or use.private)),
        center=decide(Center(), "layer" in kinds and inputs is not None and deploys),
        group_norm=decide(
            Replace("group_norm", include=not_by_default(inspection) or None),
            live and (use.leaves_the_batch or always),
        ),
        raw=raw.edits[0].reason.partition(" moves into ")[2] if raw else None,
        cost=cost,
        measured=measure(model, inspection, seconds) if measure else None,
        with_inputs=inputs is not None,
        untrained=_untrained(model, inspection),
    )


def not_by_default(inspection: Inspection) -> list[str]:
    """The sites that depend on the batch, where `convert` has to be told them; else none."""
    live = [site.name for site in inspection.sites if site.depends_on_batch]
    default = [site.name for site in inspection.sites if site.kind == "batch"]
    return [] if live == default else live


def _takes_images(inputs: Any) -> bool:
    first = inputs[0] if isinstance(inputs, tuple) and inputs else inputs
    return isinstance(first, torch.Tensor) and first.dim() == 4 and first.shape[1] == 3


def _samples(inputs: Any) -> int:
    first = next(iter(inputs.values()), None) if isinstance(inputs, dict) else inputs
    first = first[0] if isinstance(first, tuple) and first else first
    return max(len(first), 1) if isinstance(first, torch.Tensor) and first.dim() else 1


def _untrained(model: nn.Module, inspection: Inspection) -> int:
    """As `Findings.untrained`."""
    modules = dict(model.named_modules())
    count = 0
    for site in inspection.sites:
        known = site.kind in FOLDED and bool(site.paths)
        buffers = dict(modules[site.name].named_buffers(recurse=False)) if known else {}
        mean, variance = buffers.get("running_mean"), buffers.get("running_var")
        if mean is not None and variance is not None and not torch.nn.parameter.is_lazy(mean):
            count += bool((mean == 0).all() and (variance == 1).all())
    return count


def time_of(findings: Findings) -> str:
    """A sentence on the time that the normalizations take; empty where it is unknown."""
    cost = findings.cost
    if cost is None or cost.share < 0.005:
        return ""
    where = "on this CPU" if cost.device == "cpu" else f"on this {cost.device} device"
    return f"The normalizations take {cost.share:.0%} of a forward pass {where}, uncompiled."
