"""Move gains and biases of normalizations into what follows them, for inference.

A LayerNorm, RMSNorm, GroupNorm or InstanceNorm takes statistics, then y = gain * n + bias per
channel. Of W y + c that is a part: W' = W diag(gain), c' = c + W bias. Ashkboos et al. 2024
(arXiv 2401.15024, section 3) do so before they rotate a network, and quantizers do before they
round: what follows a normalization is then of one size in all channels.

Rules:
1. The affine moves *downstream*, by the table that moves a frozen BatchNorm's (`graph.operators`),
   into every Linear and convolution that its output reaches: query, key and value at once. If one
   consumer cannot fold it in (a residual sum, an activation), the site is left.
2. Gain and bias move together where every layer has a bias already, so that a checkpoint of the
   model keeps its keys. Otherwise, or before a convolution that pads with zeros, the gain moves
   alone, and the normalization adds bias / gain.
3. Afterwards the normalization is the same module with a gain of 1 (a weight of 0, where the gain
   is 1 + weight) and a bias of 0, so that the checkpoint of the model keeps its keys.
4. A weight that another module shares, as a head that is tied to the embedding, is left, unless it
   may be untied: the model would be loaded with both tied again.
5. An RMSNorm is redundant, up to eps, where all that reads it is normalized again. Its reason says
   so, and on request it is removed once its gain has moved, if on the examples the outputs move by
   no more than 1e-3 of the largest without it (`passes.redundant`).

The arithmetic is in float64 and cast back to the weight's own dtype.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from normswap.core.errors import Unsupported
from normswap.graph.capture import Capture, capture
from normswap.graph.formula import normalizing
from normswap.graph.index import Index, join
from normswap.graph.norm_modules import formula
from normswap.graph.operators.layout import along
from normswap.graph.operators.rule import shape_of
from normswap.graph.parametrized import parametrized_tensors
from normswap.graph.propagation.absorbers import Absorber
from normswap.graph.propagation.affines import Affines
from normswap.graph.propagation.scale_shift import Conditions, ScaleShift
from normswap.graph.sites import Call, NormSite, find_sites
from normswap.norms.sample.rms import RMSNorm
from normswap.passes.bake import bake_edits
from normswap.passes.edits import Edit
from normswap.passes.edits.affine import ResetGain, divided_bias_why_not, gain_and_bias
from normswap.passes.edits.centering import CenteredOutput
from normswap.passes.folding import Writer, carrying
from normswap.passes.modularize import modularized_first
from normswap.passes.plan import Plan, Skipped
from normswap.passes.redundant import Redundant
from normswap.passes.selection import Globs, select

_KINDS = ("layer", "rms", "group", "instance")


class FoldAffine:
    """Fold gains and biases of the selected normalizations; see the module's docstring.

    Args:
        include, exclude: globs on site names; by default every normalization of these kinds.
        assume_example: the model is called in no other way than in the example.
        untie: a weight that several modules share may become two.
        remove_redundant: remove each RMSNorm that what follows it makes redundant.
    """

    def __init__(
        self,
        *,
        include: Globs | None = None,
        exclude: Globs = (),
        assume_example: bool = False,
        untie: bool = False,
        remove_redundant: bool = False,
    ) -> None:
        self.include, self.exclude = include, exclude
        self.assume_example, self.untie = assume_example, untie
        self.remove_redundant = remove_redundant

    def __str__(self) -> str:
        return "FoldAffine(remove_redundant)" if self.remove_redundant else "FoldAffine"

    def plan(self, model: nn.Module, inputs: Any = None) -> Plan:
        """The edits for each site whose gain and bias can move.

        Raises:
            NormswapError: the model has no normalization, or none is selected.
        """
        seen = capture(model, inputs)
        sites = find_sites(seen)
        selected, others = select(sites, self.include, self.exclude, kinds=_KINDS)
        whole, as_calls = modularized_first(self, seen, selected, inputs, other_kinds=True)
        if whole is not None:
            return whole
        selected = [site for site in selected if site.owner == "module"]
        gains = Gains(seen, sites, assume_example=self.assume_example, untie=self.untie)
        redundant = Redundant(seen, sites, inputs, assume_example=self.assume_example)
        edits: list[Edit] = []
        left = [Skipped(site=site.name, reason=reason) for site, reason in others] + as_calls
        for site in selected:
            try:
                edits += self._edits(site, gains, redundant)
            except Unsupported as reason:
                left.append(Skipped(site=site.name, reason=str(reason)))
        return Plan(passes=(str(self),), edits=tuple(edits), left=tuple(left))

    def _edits(self, site: NormSite, gains: "Gains", redundant: Redundant) -> list[Edit]:
        """The edits that fold the affine of `site`, and remove it if that is asked for.

        Raises:
            Unsupported: neither can be done.
        """
        ends, why_not = redundant.ends(site), ""
        edits: list[Edit] = []
        try:
            edits += gains.folded(site)
        except Unsupported as reason:
            if not ends:
                raise
            why_not = str(reason)
        if not ends:
            return edits
        again = f"all that reads it is normalized again by {', '.join(ends)}"
        removal: list[Edit] = []
        if why_not and not redundant.is_bare(site):
            said = f"it is redundant but for its gain, as {again}"
        elif not self.remove_redundant:
            said = f"it is redundant up to eps, as {again} (remove_redundant=True removes it)"
        else:
            try:
                removal = [redundant.removed(site, again)]
                said = removal[0].reason
            except Unsupported as too_far:
                said = f"it stays, though {again}: {too_far}"
        if edits:
            edits[-1] = edits[-1].model_copy(update={"reason": f"{edits[-1].reason}; {said}"})
        elif not removal:
            raise Unsupported(f"{why_not}; {said}")
        return edits + removal


class Gains:
    """Folds the gains and biases of a captured model, one after the other.

    Args:
        sites: all normalizations of the model.
        assume_example, untie: as of `FoldAffine`.
    """

    def __init__(
        self, seen: Capture, sites: Sequence[NormSite], *, assume_example: bool, untie: bool
    ) -> None:
        self._affines = Affines(seen, sites, assume_example=assume_example)
        self._index, self._writer, self._untie = seen.index, Writer(seen), untie

    def folded(self, site: NormSite) -> list[Edit]:
        """The edits that fold the gain and bias of `site` into what follows it.

        Raises:
            Unsupported: something stops them.
        """
        found, keeps_bias = self._absorbers(site)
        conditions = self._affines.conditions
        edits = _edits(self._writer, site, found, conditions, keeps_bias=keeps_bias)
        self._affines.moved(site, found, passed=False)
        return edits

    def _absorbers(self, site: NormSite) -> tuple[tuple[Absorber, ...], bool]:
        """What folds in the affine of `site`, and whether its bias stays.

        Raises:
            Unsupported: nothing does; the message says what stops it.
        """
        if site.kind not in _KINDS:
            raise Unsupported(f"is {site.kind} normalization, whose affine is not the last it does")
        if not site.affine:
            raise Unsupported("has no gain or bias")
        affines, index = self._affines, self._index
        affines.owners.check_seen(site)
        if any(call.region.symbolic for call in site.executions):
            raise Unsupported("no shape is known; give example inputs")
        norm = index.modules[site.name]
        seeds, own = dict[fx.Node, Tensor](), dict[fx.Node, fx.Node | None]()
        for call in site.executions:
            value, axis = _normalized(index.model, site, call)
            size = shape_of(value)[axis]
            seeds[value] = along(len(shape_of(value)), axis, torch.arange(size))
            own[value] = call.input
        held = formula(norm)
        with torch.no_grad():
            gain, bias = gain_and_bias(norm, torch.float64)
        folds = partial(
            affines.folds,
            seeds,
            own,
            ScaleShift(gain, bias, invertible=False),
            upstream=False,
            new_biases=False,
        )
        if held is None or held.bias is None:
            found, keeps_bias = folds(scale_alone=True), False
        else:
            try:
                found, keeps_bias = folds(), False
            except Unsupported as reason:
                found, keeps_bias = _gain_alone(folds, norm, reason), True
        if not self._untie:
            _check_tied(index, found)
        return found, keeps_bias


def _gain_alone(
    folds: Callable[..., tuple[Absorber, ...]], norm: nn.Module, reason: Unsupported
) -> tuple[Absorber, ...]:
    """What folds in the gain, where the bias has no place to go for the `reason`."""
    held = formula(norm)
    if held is None or held.gain is None:
        raise reason
    why_not = divided_bias_why_not(norm)
    if why_not is None:
        try:
            return folds(scale_alone=True)
        except Unsupported as other:
            why_not = str(other)
    raise Unsupported("; ".join(dict.fromkeys([str(reason), why_not])))


def _check_tied(index: Index, found: Iterable[Absorber]) -> None:
    for each in found:
        tensor = index.tensor(join(each.path, each.weight))
        others = set() if tensor is None else index.owners(tensor) - {index.modules[each.path]}
        if others:
            other = min(index.paths[module][0] for module in others)
            raise Unsupported(
                f"{join(each.path, each.weight)} is tied to that of {other}; untie=True gives each "
                "its own"
            )


def _normalized(model: nn.Module, site: NormSite, call: Call) -> tuple[fx.Node, int]:
    """The value that the gain and bias give, and the axis of its channels."""
    norm = model.get_submodule(site.name)
    if not isinstance(norm, RMSNorm) or call.output is None:
        return normalizing(model, site, call)
    # Ours is several operators, whose last is all that `call` shows.
    if norm._forward_hooks:
        raise Unsupported("has a hook, which may change what it returns")
    if isinstance(norm, CenteredOutput):
        raise Unsupported("its output is centered")
    if parametrized_tensors(norm):
        raise Unsupported("its gain or bias is parametrized; bake it first")
    return call.output, norm.channel_axis


def _edits(
    writer: Writer,
    site: NormSite,
    found: tuple[Absorber, ...],
    conditions: Conditions,
    *,
    keeps_bias: bool,
) -> list[Edit]:
    name, layers = site.name, ", ".join(dict.fromkeys(absorber.path for absorber in found))
    edits = writer.folding(name, found, {"norm": name, "of_gain": True, "conditions": conditions})
    edits += bake_edits(carrying(edits), name)
    reason = f"its gain moves into {layers}, and its bias has no place there"
    if not keeps_bias:
        reason = f"its gain and bias move into {layers}"
    return [*edits, ResetGain(site=name, path=name, reason=reason, keeps_bias=keeps_bias)]
