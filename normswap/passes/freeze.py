"""Freeze the statistics of BatchNorms for fine-tuning, and thaw them again.

Rules of Freeze:
1. In mode "eval" every selected BatchNorm with running statistics normalizes with them from now on,
   in training too; nothing else about it changes.
2. In mode "tune" (Jiang et al. 2023, arXiv 2305.11624) the weight before it computes its affine,
   where `normswap.graph.propagation` shows that this is exact in training: the same function and
   the same gradients of weight, gamma and beta, without keeping the BatchNorm's input for backward.
   Where it is not exact the site is frozen as in mode "eval", with the reason.
3. A BatchNorm without running statistics has none to freeze and is left. One that has them and is
   called as a function with `training=True` uses them from now on, in eval mode too.
"""

from typing import Any, Literal

from torch import nn

from normswap.core.errors import NormswapError
from normswap.graph.capture import capture
from normswap.graph.norm_modules import is_foreign
from normswap.graph.sites import NormSite, find_sites
from normswap.norms.batch.frozen import FixedStatistics, check_statistics
from normswap.passes.edits import Edit, FreezeStatistics, ThawStatistics
from normswap.passes.folding import carriers, fold_sites, is_folded
from normswap.passes.modularize import modularized_first
from normswap.passes.plan import Plan, Skipped
from normswap.passes.selection import Globs, select

Mode = Literal["eval", "tune"]


class Freeze:
    """Freeze the selected BatchNorms; see the module's docstring for the rules."""

    def __init__(
        self,
        mode: Mode = "eval",
        *,
        include: Globs | None = None,
        exclude: Globs = (),
        assume_example: bool = False,
    ) -> None:
        if mode not in ("eval", "tune"):
            raise NormswapError(f"unknown mode {mode!r}; it is 'eval' or 'tune'")
        self.mode, self.include, self.exclude = mode, include, exclude
        self.assume_example = assume_example

    def __str__(self) -> str:
        return f"Freeze({self.mode})"

    def plan(self, model: nn.Module, inputs: Any = None) -> Plan:
        """The edits for each BatchNorm with running statistics.

        Raises:
            NormswapError: no site is selected, or statistics are NaN or negative.
        """
        seen = capture(model, inputs)
        sites = find_sites(seen)
        selected, others = select(sites, self.include, self.exclude, fixed=True)
        whole, as_calls = modularized_first(self, seen, selected, inputs, "running")
        if whole is not None:
            return whole
        left = [Skipped(site=site.name, reason=reason) for site, reason in others] + as_calls
        open_sites = []
        for site in (site for site in selected if site.owner == "module"):
            if is_folded(model, site):
                left.append(Skipped(site=site.name, reason="is in tune mode already"))
            else:
                open_sites.append(site)
        if self.mode == "eval":
            remaining = [(site, "") for site in open_sites]
            edits: list[Edit] = []
        else:
            training = capture(model, inputs, training=True)
            found = fold_sites(
                seen,
                sites,
                open_sites,
                training=training,
                fixed=False,
                assume_example=self.assume_example,
            )
            edits, remaining = [edit for each in found.done for edit in each.edits], found.left
        for site, why in remaining:
            known = site.why_not is None or not is_foreign(model.get_submodule(site.name))
            if site.has_fixed_affine and site.statistics == "running" and known:
                edits.append(_freeze(model, site, why))
            else:
                left.append(Skipped(site=site.name, reason=why or _why_left(site)))
        return Plan(passes=(str(self),), edits=tuple(edits), left=tuple(left))


def _freeze(model: nn.Module, site: NormSite, why: str) -> FreezeStatistics:
    check_statistics(model.get_submodule(site.name), site.name)
    reason = f"stays a module: {why}" if why else "has running statistics"
    return FreezeStatistics(site=site.name, path=site.name, reason=reason)


def _why_left(site: NormSite) -> str:
    if not site.paths:
        return "a functional call that no module owns"
    if site.statistics == "frozen":
        return "is frozen already"
    if site.kind != "batch":
        return "its eval mode is no affine per channel, so it cannot be frozen"
    if site.has_fixed_affine and site.why_not is not None:
        return site.why_not
    return "has no running statistics"


class Unfreeze:
    """Let every frozen BatchNorm train again.

    One that `Freeze` froze has its own class and parameters again. Any other, which its class keeps
    frozen (torchvision's FrozenBatchNorm2d, and whatever computes the same), becomes a BatchNorm
    with the same tensors, whose gain and bias are parameters.

    Args:
        include, exclude: globs on site names; by default every frozen one.
    """

    def __init__(self, *, include: Globs | None = None, exclude: Globs = ()) -> None:
        self.include, self.exclude = include, exclude

    def __str__(self) -> str:
        return "Unfreeze"

    def plan(self, model: nn.Module, inputs: Any = None) -> Plan:
        """Take the affines out of the weights again, last first, then thaw."""
        every = find_sites(capture(model))
        if self.include is not None or self.exclude:
            every = tuple(select(every, self.include, self.exclude)[0])
        sites = [
            site
            for site in every
            if site.statistics == "frozen" and site.paths and _can_thaw(model, site)
        ]
        edits: list[Edit] = []
        by_norm = carriers(model)
        for site in reversed(sites):
            carried = tuple(by_norm[model.get_submodule(site.name)])
            edits.append(
                ThawStatistics(
                    site=site.name, path=site.name, reason="was frozen", carriers=carried
                )
            )
        return Plan(passes=(str(self),), edits=tuple(edits))


def _can_thaw(model: nn.Module, site: NormSite) -> bool:
    return site.why_not is None or isinstance(model.get_submodule(site.name), FixedStatistics)
