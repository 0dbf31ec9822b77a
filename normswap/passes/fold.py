"""Fold frozen statistics into the weights around them, for inference.

Rules:
1. A functional normalization, and one of an exported program, gets a module first (`own`).
2. A BatchNorm with running statistics goes into the operators that compute its input, or those that
   take its output, where `normswap.graph.propagation` shows that this is exact.
3. Parallel linear branches that are summed become one convolution (`merge`), and 2 starts again.
4. What is left goes into its neighbours while others take it back, where rounding allows that.
5. With `duplicate=True` a BatchNorm left then gets its own copy of what computes its input, where
   that is cheaper (`normswap.passes.duplicate`), and 4 starts again.
6. With `pad=True` one that is left then goes into a convolution after it that pads with zeros, or
   whose input was padded. The convolution adds to its output what the shift makes of it, if that
   has no more numbers than the scale and shift (`normswap.passes.edits.padded_shift`).
7. What is left then becomes one scale and shift per channel, with the operator that stopped it. It
   stays a BatchNorm with fixed statistics where that would overflow or lose digits
   (`normswap.graph.propagation.rounding`), as 2 to 6 leave what would.
8. Weights that are computed (weight_norm, spectral_norm, standardization, tune mode) are baked
   first, and a whitening (decorrelated_batch_norm) goes into the layer before it.

A fold is built as tune mode and then baked: freeze, parametrize weight and bias, bake, remove. The
arithmetic is in float64 and cast back to the weight's own dtype.
"""

from collections.abc import Iterable
from functools import cached_property
from typing import Any

from torch import nn

from normswap.graph.branches.sums import BranchSum, find_sums
from normswap.graph.capture import Capture, capture
from normswap.graph.sites import NormSite, find_sites
from normswap.passes.bake import Bake, bake_edits, reduce_to, remove
from normswap.passes.duplicate import duplicate
from normswap.passes.edits import Edit, FreezeStatistics
from normswap.passes.edits.memory_format import to_channels_last
from normswap.passes.edits.statistics import into_affine_why_not
from normswap.passes.folding import FoldedSites, fold_sites
from normswap.passes.merge import merge
from normswap.passes.modularize import modularize, modularize_convs
from normswap.passes.plan import Plan, Skipped
from normswap.passes.selection import Globs, select
from normswap.passes.whiten import fold_whitening


class Fold:
    """Fold the selected BatchNorms; see the module's docstring for the rules.

    Args:
        include, exclude: globs on site names; by default every BatchNorm.
        channels_last: lay the weights out for convolutions on a CPU.
        duplicate: copy an embedding or a convolution of one weight per channel whose output others
            use as well, so that a BatchNorm can be folded into it. The copy takes memory.
        pad: fold a BatchNorm into a convolution after it that pads with zeros, too, where that is
            cheaper. It holds what the shift makes of an output: the memory of one sample's.
        assume_example: the model is called in no other way than in the example.
    """

    def __init__(
        self,
        *,
        include: Globs | None = None,
        exclude: Globs = (),
        channels_last: bool = False,
        duplicate: bool = False,
        assume_example: bool = False,
        pad: bool = False,
    ) -> None:
        self.include, self.exclude = include, exclude
        self.channels_last, self.duplicate, self.pad = channels_last, duplicate, pad
        self.assume_example = assume_example

    def __str__(self) -> str:
        options = [name for name in ("channels_last", "duplicate", "pad") if getattr(self, name)]
        return f"Fold({', '.join(options)})" if options else "Fold"

    def plan(self, model: nn.Module, inputs: Any = None) -> Plan:
        """The edits for each site that can be folded.

        Raises:
            NormswapError: no site is selected, statistics are NaN or negative, or the folded model
                does not run in channels_last, which was asked for.
        """
        course = _Course(model, inputs, self.assume_example)
        sites = course.sites
        course.bake()
        selected, others = self._select(sites, baked=bool(course.edits))
        names = {site.name for site in selected}
        unknown = [*course.modularize(names), *course.whiten(names)]
        names -= {site.name for site, _ in unknown}
        while course.merge(names):
            pass
        while self.duplicate and course.duplicate(names):
            pass
        course.fold_as_traced(names)
        unknown += course.fold_sites(names, pad=self.pad)
        edits = list(course.edits)
        if self.channels_last:  # tried on what the other edits make
            edits.append(to_channels_last(Plan(edits=tuple(edits)).apply(model), inputs))
        return Plan(
            passes=(str(self),),
            edits=tuple(edits),
            left=tuple(Skipped(site=site.name, reason=why) for site, why in (*others, *unknown)),
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


class _Course:
    """A model, the edits decided so far, and what it looks like after them."""

    def __init__(self, model: nn.Module, inputs: Any, assume_example: bool) -> None:
        self._model, self._inputs, self._copied = model, inputs, False
        self._assume_example = assume_example
        self.edits: list[Edit] = []
        self._not_copied: dict[str, str] = {}  # the sites that may have no copy, with the reason
        self._removed: set[str] = set()  # the sites whose affine is in weights by now

    @cached_property
    def _seen(self) -> Capture:
        return capture(self._model, self._inputs)

    @cached_property
    def sites(self) -> tuple[NormSite, ...]:
        """The normalizations that the edits leave."""
        return find_sites(self._seen)

    @cached_property
    def _sums(self) -> list[BranchSum]:
        return find_sums(self._seen)

    def _carry_out(self, edits: Iterable[Edit]) -> None:
        """Decide `edits`, and go on with what the model is after them."""
        decided = Plan(edits=tuple(edits))
        if decided.edits:
            self.edits += decided.edits
            self._model = decided.apply(self._model, inplace=self._copied)
            self._copied = True
            for name in ("_seen", "sites", "_sums"):  # a capture takes long; look when asked
                vars(self).pop(name, None)

    def modularize(self, names: set[str]) -> list[tuple[NormSite, str]]:
        """Give the functional ones of the named sites a module; what cannot have one, and why."""
        functional = [s for s in self.sites if s.name in names and s.owner == "functional"]
        if not functional:
            return []
        edits, as_calls = modularize(self._seen, functional, self._inputs)
        self._carry_out(edits)
        return as_calls

    def bake(self) -> None:
        """Bake every weight that is computed: by tune mode, a normalization of weights, a hook."""
        self._carry_out(Bake().plan(self._model).edits)

    def whiten(self, names: set[str]) -> list[tuple[NormSite, str]]:
        """Move the whitening of the named sites into weights; what cannot be, with the reason."""
        sites = [site for site in self.sites if site.name in names]
        edits, left = fold_whitening(self._seen, sites)
        self._carry_out(edits)
        return left

    def merge(self, names: set[str]) -> bool:
        """Merge parallel branches, once the affines of the named sites are in their weights.

        Returns:
            Whether there were any, so that more may be folded.
        """
        if not self._sums:
            return False
        self._fold(self._folded_sites(names, inverse=False))
        self._carry_out(modularize_convs(self._seen, self._inputs, self._sums))
        edits, left = merge(
            self._seen,
            self._inputs,
            self._sums,
            assume_example=self._assume_example,
        )
        self._carry_out(edits)
        # Where every sum is merged and every site folded, nothing is left to look for.
        return bool(edits) and (bool(left) or not names <= self._removed)

    def duplicate(self, names: set[str]) -> bool:
        """Give one of the named sites a copy of its own of what computes its input.

        Returns:
            Whether one may have it, so that more may be folded.
        """
        found = self._folded_sites(names, inverse=True)
        self._fold(found)
        stuck = {site.name for site, _ in found.stuck}
        sites = [site for site in self.sites if site.name in stuck]
        edits, self._not_copied = duplicate(self._seen, sites, self._inputs)
        self._carry_out(edits)
        return bool(edits)

    def fold_as_traced(self, names: set[str]) -> None:
        """Fold in what a symbolic trace shows of a model that could only be captured in parts.

        What lies between two parts is in no captured graph; a trace knows no shapes, but all calls.
        """
        if self._inputs is None or names <= self._removed or self._seen.how != "submodules":
            return
        traced = capture(self._model)
        sites = find_sites(traced)
        stuck = {
            site.name for site, _ in self._folded_sites(names, inverse=True).left if site.calls != 0
        }
        found = fold_sites(
            traced,
            sites,
            [site for site in sites if site.name in stuck],
            assume_example=self._assume_example,
        )
        self._fold(found)

    def fold_sites(self, names: set[str], *, pad: bool) -> list[tuple[NormSite, str]]:
        """Move the affine of the named sites into weights, or leave it as scale and shift.

        Returns:
            The sites that stay what they are, with the reason.
        """
        if names <= self._removed:
            return []
        found = self._folded_sites(names, inverse=True, pad=pad, split=True)
        self.edits += _folded(found)
        unknown = found.unknown
        for site, why in found.stuck:
            refused = self._not_copied.get(site.name)
            why = f"{why}; no copy: {refused}" if refused else why
            rounds = into_affine_why_not(self._model.get_submodule(site.name))
            if rounds is None:
                self.edits.append(reduce_to("affine", site, f"stays: {why}"))
                continue
            why = why if why.startswith(rounds) else f"{why}; no scale and shift: {rounds}"
            if site.statistics == "running":
                self.edits.append(_frozen(site, why))
            else:
                unknown.append((site, why))
        return unknown

    def _fold(self, found: FoldedSites) -> None:
        self._removed |= {each.site.name for each in found.done}
        self._carry_out(_folded(found))

    def _folded_sites(
        self, names: set[str], *, inverse: bool, pad: bool = False, split: bool = False
    ) -> FoldedSites:
        sites = [site for site in self.sites if site.name in names]
        return fold_sites(
            self._seen,
            self.sites,
            sites,
            inverse=inverse,
            assume_example=self._assume_example,
            pad=pad,
            split=split,
        )


def _folded(found: FoldedSites) -> list[Edit]:
    edits: list[Edit] = []
    for each in found.done:
        last = remove(each.site)
        if (why := each.shift_stays) is not None:
            reason = f"its scale is in the weight; its shift stays: {why}"
            last = reduce_to("shift", each.site, reason)
        edits += [*each.edits, *bake_edits(each.tensors, each.site.name), last]
    return edits


def _frozen(site: NormSite, why: str) -> FreezeStatistics:
    reason = f"stays a BatchNorm: {why}"
    return FreezeStatistics(site=site.name, path=site.name, reason=reason)
