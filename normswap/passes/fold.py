"""Fold frozen statistics into the weights around them, for inference.

Rules:
1. A functional normalization, and one of an exported program, gets a module first (`own`).
2. A BatchNorm with running statistics goes into the operators that compute its input, or those that
   take its output, where `normswap.graph.affine` shows that this is exact.
3. Parallel linear branches that are summed become one convolution (`merge`), and 2 starts again.
4. What is left goes into its neighbours while others take it back, where rounding allows that.
5. With `duplicate=True` a BatchNorm left then gets its own copy of what computes its input, where
   that is cheaper (`normswap.passes.duplicate`), and 4 starts again.
6. What is left then becomes one scale and shift per channel, with the operator that stopped it.
7. Weights that are computed (weight_norm, spectral_norm, standardization, tune mode) are baked
   first, and a whitening (decorrelated_batch_norm) goes into the layer before it.

A fold is built as tune mode and then baked: freeze, parametrize weight and bias, bake, remove. The
arithmetic is in float64 and cast back to the weight's own dtype.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from normswap.graph.branches.sums import find_sums
from normswap.graph.capture import Capture, capture
from normswap.graph.sites import NormSite, find_sites
from normswap.passes.absorb import Absorption, absorb
from normswap.passes.bake import Bake, bake_edits, remove
from normswap.passes.duplicate import duplicate
from normswap.passes.edits import Edit, ToAffine
from normswap.passes.edits.layout import ToChannelsLast
from normswap.passes.merge import merge
from normswap.passes.own import own
from normswap.passes.own_convs import own_convs
from normswap.passes.plan import Left, Plan
from normswap.passes.selection import Globs, select
from normswap.passes.whiten import fold_whitening


class Fold:
    """Fold the selected BatchNorms; see the module's docstring for the rules.

    Args:
        include, exclude: globs on site names; by default every BatchNorm.
        channels_last: lay the weights out for convolutions on a CPU.
        duplicate: copy an embedding or a convolution of one weight per channel whose output others
            use as well, so that a BatchNorm can be folded into it. The copy takes memory.
    """

    def __init__(
        self,
        *,
        include: Globs | None = None,
        exclude: Globs = (),
        channels_last: bool = False,
        duplicate: bool = False,
    ) -> None:
        self.include, self.exclude = include, exclude
        self.channels_last, self.duplicate = channels_last, duplicate

    def __str__(self) -> str:
        options = [name for name in ("channels_last", "duplicate") if getattr(self, name)]
        return f"Fold({', '.join(options)})" if options else "Fold"

    def plan(self, model: nn.Module, inputs: Any = None) -> Plan:
        """The edits for each site that can be folded.

        Raises:
            NormswapError: no site is selected, or statistics are NaN or negative.
        """
        course = _Course(model, inputs)
        sites = course.sites
        course.bake()
        selected, others = self._select(sites, baked=bool(course.edits))
        names = {site.name for site in selected}
        unknown = [*course.own(names), *course.whiten(names)]
        names -= {site.name for site, _ in unknown}
        while course.merge(names):
            pass
        while self.duplicate and course.duplicate(names):
            pass
        unknown += course.absorb(names)
        edits = [*course.edits, *([_LAYOUT] if self.channels_last else [])]
        return Plan(
            passes=(str(self),),
            edits=tuple(edits),
            left=tuple(Left(site=site.name, reason=why) for site, why in (*others, *unknown)),
        )

    def _select(
        self, sites: tuple[NormSite, ...], *, baked: bool
    ) -> tuple[list[NormSite], list[tuple[NormSite, str]]]:
        if (
            baked
            and self.include is None
            and not any(site.kind in _KINDS or site.has_fixed_affine for site in sites)
        ):
            return [], []  # normalized weights alone are worth a fold
        return select(sites, self.include, self.exclude, kinds=_KINDS, fixed=True)


_KINDS = ("batch", "decorrelated_batch")
_LAYOUT = ToChannelsLast(site="", path="", reason="convolutions on a CPU compute in this layout")


class _Course:
    """A model, the edits decided so far, and what it looks like after them."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self._model, self._inputs, self._copied = model, inputs, False
        self.edits: list[Edit] = []
        self._not_copied: dict[str, str] = {}  # the sites that may have no copy, with the reason
        self._look()

    def _look(self) -> None:
        self._seen: Capture = capture(self._model, self._inputs)
        self.sites = find_sites(self._model, self._seen)

    def _carry_out(self, edits: Iterable[Edit]) -> None:
        """Decide `edits`, and go on with what the model is after them."""
        decided = Plan(edits=tuple(edits))
        if decided.edits:
            self.edits += decided.edits
            self._model = decided.apply(self._model, inplace=self._copied)
            self._copied = True
            self._look()

    def own(self, names: set[str]) -> list[tuple[NormSite, str]]:
        """Give the functional ones of the named sites a module; what cannot have one, and why."""
        functional = [s for s in self.sites if s.name in names and s.owner == "functional"]
        if not functional:
            return []
        edits, unowned = own(self._model, self._seen, functional, self._inputs)
        self._carry_out(edits)
        return unowned

    def bake(self) -> None:
        """Bake every weight that is computed: by tune mode, a normalization of weights, a hook."""
        self._carry_out(Bake().plan(self._model).edits)

    def whiten(self, names: set[str]) -> list[tuple[NormSite, str]]:
        """Move the whitening of the named sites into weights; what cannot be, with the reason."""
        sites = [site for site in self.sites if site.name in names]
        edits, left = fold_whitening(self._model, self._seen, sites)
        self._carry_out(edits)
        return left

    def merge(self, names: set[str]) -> bool:
        """Merge parallel branches, once the affines of the named sites are in their weights.

        Returns:
            Whether there were any, so that more may be absorbed.
        """
        if not find_sums(self._model, self._seen):
            return False
        self._carry_out(_folded(self._absorption(names, inverse=False)))
        self._carry_out(own_convs(self._model, self._seen, self._inputs))
        edits, _ = merge(self._model, self._seen, self._inputs)
        self._carry_out(edits)
        return bool(edits)

    def duplicate(self, names: set[str]) -> bool:
        """Give one of the named sites a copy of its own of what computes its input.

        Returns:
            Whether one may have it, so that more may be absorbed.
        """
        found = self._absorption(names, inverse=True)
        self._carry_out(_folded(found))
        stuck = {site.name for site, _ in found.stuck}
        sites = [site for site in self.sites if site.name in stuck]
        edit, self._not_copied = duplicate(self._model, self._seen, sites, self._inputs)
        self._carry_out([edit] if edit else [])
        return edit is not None

    def absorb(self, names: set[str]) -> list[tuple[NormSite, str]]:
        """Move the affine of the named sites into weights, or leave it as scale and shift.

        Returns:
            The sites that stay what they are, with the reason.
        """
        found = self._absorption(names, inverse=True)
        self.edits += _folded(found)
        for site, why in found.stuck:
            refused = self._not_copied.get(site.name)
            self.edits.append(_affine(site, f"{why}; no copy: {refused}" if refused else why))
        return found.unknown

    def _absorption(self, names: set[str], *, inverse: bool) -> Absorption:
        sites = [site for site in self.sites if site.name in names]
        return absorb(self._model, self._seen, self.sites, sites, inverse=inverse)


def _folded(found: Absorption) -> list[Edit]:
    edits: list[Edit] = []
    for each in found.done:
        edits += [*each.edits, *bake_edits(each.tensors, each.site.name), remove(each.site)]
    return edits


def _affine(site: NormSite, why: str) -> ToAffine:
    assert site.num_features is not None
    return ToAffine(
        site=site.name,
        path=site.name,
        aliases=site.paths,
        num_features=site.num_features,
        tail=site.tail,
        reason=f"stays: {why}",
    )
