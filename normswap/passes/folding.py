"""Move the affine of BatchNorms with fixed statistics into the weights around them.

The common part of a fold and of freezing in tune mode: for each site the edits that freeze it, make
room for a bias, and put parametrizations on the weights and biases that fold it in.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TypedDict

import torch
from torch import Tensor, nn

from normswap.core.errors import Unsupported
from normswap.graph.capture import Capture
from normswap.graph.parametrized import chain_of, in_eval, parametrized_tensors
from normswap.graph.propagation.absorbers import Absorber
from normswap.graph.propagation.affines import Affines
from normswap.graph.propagation.rounding import Taking
from normswap.graph.propagation.scale_shift import Conditions, ScaleShift
from normswap.graph.sites import NormSite, find_sites
from normswap.norms.batch.frozen import check_statistics
from normswap.norms.hooked import hooked_tensors
from normswap.norms.weight.frozen_affine import AffineParametrization
from normswap.passes.edits import (
    AddPaddedShift,
    Edit,
    FoldIntoTensor,
    FreezeStatistics,
    GiveBias,
    StatisticsIntoAffine,
)
from normswap.passes.edits.affine import GivenAffine
from normswap.passes.edits.base import computing
from normswap.passes.edits.statistics import affine_of, into_affine_why_not
from normswap.passes.forwards import Forwards


@dataclass(frozen=True)
class FoldedSite:
    """A site whose affine weights can carry: who carries it, and the edits that make it so."""

    site: NormSite
    absorbers: tuple[Absorber, ...]
    edits: tuple[Edit, ...]
    shift_stays: str | None = None  # why it is added at the place of the site

    @property
    def tensors(self) -> list[tuple[str, str]]:
        """What carries it, as (module path, tensor name), in an order in which it can be baked."""
        return carrying(self.edits)


@dataclass
class FoldedSites:
    """What `fold_sites` decided.

    Attributes:
        done: the sites that weights can carry.
        stuck: those that an operator stops, with the reason.
        unknown: those that are no affine, or not fully seen, with the reason.
    """

    done: list[FoldedSite] = field(default_factory=list)
    stuck: list[tuple[NormSite, str]] = field(default_factory=list)
    unknown: list[tuple[NormSite, str]] = field(default_factory=list)

    @property
    def left(self) -> list[tuple[NormSite, str]]:
        """All that are not folded."""
        return [*self.unknown, *self.stuck]


def fold_sites(
    seen: Capture,
    every: Sequence[NormSite],
    sites: Sequence[NormSite],
    *,
    training: Capture | None = None,
    fixed: bool = True,
    inverse: bool = False,
    chain: bool = True,
    downstream: bool = True,
    assume_example: bool = False,
    pad: bool = False,
    split: bool = False,
) -> FoldedSites:
    """Plan the absorption of every one of `sites` that allows it.

    Args:
        seen: a capture of a model in eval mode.
        every: all sites of the model.
        training: a capture of training mode, where it must be exact in that mode too.
        fixed: the numbers stay as they are, so that what is folded may depend on them.
        inverse: what is left then may be folded while others take it back.
        chain: an affine may move on through a site that was folded before it.
        downstream: an affine may also move into what follows.
        assume_example: the model is called in no other way than in the example.
        pad: what is left then may be folded by padded convolutions, which add its shift.
        split: of what is left then the scale may move alone.

    Raises:
        NormswapError: running statistics that cannot be used (NaN, negative variance).
    """
    tuned, model = training is not None, seen.model
    affines = Affines(
        seen,
        every,
        fixed=fixed,
        training=tuned,
        downstream=downstream,
        assume_example=assume_example,
    )
    in_training = None if training is None else _InTraining(training)
    writer, rounding = Writer(seen), _Rounding(model)
    result, open_sites = FoldedSites(), list[NormSite]()
    for site in sites:
        try:
            affines.check(site)
            if tuned:
                _check_gain(model.get_submodule(site.name))
            open_sites.append(site)
        except Unsupported as reason:
            result.unknown.append((site, str(reason)))
    reasons: dict[str, str] = {}  # the first one of each
    rounds = [(False, False, False), *[(True, False, False)] * inverse]
    rounds += [(False, True, False)] * pad + [(True, True, False)] * (inverse and pad)
    for taken_back, padded, stays in rounds + [(False, False, True)] * split:
        result.stuck = []
        for site in open_sites:
            try:
                found = affines.absorbers(
                    site, inverse=taken_back, padded=padded, shift_stays=stays
                )
                if in_training is not None:
                    in_training.check(site, found)
                if stays and (why := into_affine_why_not(model.get_submodule(site.name))):
                    raise Unsupported(why)
                edits = writer.edits(site, found, affines.conditions)
                check_statistics(model.get_submodule(site.name), site.name)
                rounding.take(edits, affines.numbers(site))
            except Unsupported as reason:
                if padded and not taken_back:  # which says more of what stops it
                    reasons[site.name] = str(reason)
                result.stuck.append((site, reasons.setdefault(site.name, str(reason))))
                continue
            affines.moved(site, found, passed=chain and not stays)
            why = reasons[site.name] if stays else None
            result.done.append(FoldedSite(site, found, edits, why))
        open_sites = [site for site, _ in result.stuck]
    return result


def _check_gain(norm: nn.Module) -> None:
    """A weight that a hook computes is, between two calls, the one of the call before.

    Raises:
        Unsupported: and the hook is none of those whose next value is known.
    """
    for name in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(vars(norm).get(name), Tensor) and name not in hooked_tensors(norm):
            raise Unsupported(f"its {name} is set by a hook or by its forward in every call")


class _Rounding:
    """What the tensors of a model are after the edits so far, in the numbers of their dtype."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._taken: dict[tuple[str, str], list[Taking]] = {}

    def take(self, edits: Sequence[Edit], numbers: ScaleShift | None) -> None:
        """Note that tensors fold in an affine of these numbers, by `edits`.

        Raises:
            Unsupported: one of them cannot in its dtype.
        """
        taking, channels = dict[tuple[str, str], Taking](), 0
        for edit in edits:
            why = None
            if isinstance(edit, GiveBias):
                channels = edit.channels
            elif isinstance(edit, StatisticsIntoAffine):
                why = into_affine_why_not(self._model.get_submodule(edit.path))
            elif isinstance(edit, AddPaddedShift):
                weight = self._now(edit.path, "weight")
                assert weight is not None
                norm = self._model.get_submodule(edit.norm)
                why = edit.why_not(weight, affine_of(norm) if numbers is None else numbers)
            elif isinstance(edit, FoldIntoTensor):
                norm = self._model.get_submodule(edit.norm)
                each = edit.taking(affine_of(norm) if numbers is None else numbers)
                weight = self._now(edit.path, edit.weight)
                tensor = self._now(edit.path, edit.tensor)
                if edit.given:
                    like = computing(self._model.get_submodule(edit.path))
                    tensor = like.new_zeros(channels, requires_grad=False)
                why = None if tensor is None else each.why_not(tensor, weight)
                taking[edit.path, edit.tensor] = each
            if why is not None:
                raise Unsupported(f"{why} ({edit.path})")
        for name, each in taking.items():
            self._taken.setdefault(name, []).append(each)

    def _now(self, path: str, name: str) -> Tensor | None:
        """The tensor, with the scales that it has folded in."""
        module = self._model.get_submodule(path)
        with in_eval(module), torch.no_grad():
            tensor = getattr(module, name, None)
            for each in self._taken.get((path, name), ()):
                if isinstance(tensor, Tensor) and each.role != "input_bias":
                    tensor = each.folds(tensor).to(tensor.dtype)
        return tensor.detach() if isinstance(tensor, Tensor) else None


class _InTraining:
    """The same absorbers must be found in the graph of training mode.

    What acts in training alone (stochastic depth, an auxiliary loss) is not in eval mode's graph.
    """

    def __init__(self, seen: Capture) -> None:
        sites = find_sites(seen)
        self._sites = {site.name: site for site in sites}
        # What else may take a value is asked of eval mode's graph.
        self._affines = Affines(seen, sites, fixed=False, training=True, assume_example=True)

    def check(self, site: NormSite, found: tuple[Absorber, ...]) -> None:
        same_site = self._sites[site.name]
        try:
            in_training = self._affines.absorbers(same_site)
        except Unsupported as reason:
            raise Unsupported(f"in training {reason}") from reason
        if set(in_training) != set(found):
            raise Unsupported("follows another module in training")
        self._affines.moved(same_site, found)


class Affine(TypedDict, total=False):
    """Where the numbers of an affine come from, as the attributes of `FoldIntoTensor`."""

    norm: str
    of_gain: bool
    numbers: GivenAffine
    conditions: Conditions


class Writer:
    """Writes down as edits what was decided."""

    def __init__(self, seen: Capture) -> None:
        self._regions, self._forwards = seen.index.region_of, Forwards(seen, None)

    def edits(
        self, site: NormSite, found: tuple[Absorber, ...], conditions: Conditions
    ) -> tuple[Edit, ...]:
        """The edits by which `found` fold in `site`.

        Args:
            conditions: what was decided by the numbers of `site`.

        Raises:
            Unsupported: a bias cannot be given.
        """
        edits: list[Edit] = [
            FreezeStatistics(
                site=site.name,
                path=site.name,
                reason=f"{site.cls}({site.num_features})",
                folded=True,
                tail=site.tail,
                conditions=conditions,
            )
        ]
        return (*edits, *self.folding(site.name, found))

    def folding(
        self, site: str, found: Sequence[Absorber], affine: Affine | None = None
    ) -> list[Edit]:
        """The edits by which `found` fold in an affine.

        Args:
            affine: where its numbers come from; by default the frozen BatchNorm at `site`.

        Raises:
            Unsupported: a bias cannot be given.
        """
        edits: list[Edit] = []
        adjusted: set[str] = set()
        for absorber in found:
            reason = f"carries the affine of {site}"
            if absorber.normalization and absorber.path not in adjusted:  # it may have two sides
                adjusted.add(absorber.path)
                edits.append(StatisticsIntoAffine(site=site, path=absorber.path, reason=reason))
            if absorber.around is not None:
                edits.append(_padded(site, absorber, reason))
            if absorber.gives_bias:
                edits.append(self._bias(site, absorber, reason))
            edits += _shares(site, absorber, reason, affine or {"norm": site})
        return edits

    def _bias(self, site: str, absorber: Absorber, reason: str) -> GiveBias:
        assert absorber.bias_index is not None
        channels, path = prod(absorber.bias_index.shape), absorber.path
        where = {self._regions[node].module_path(node) for node in absorber.nodes}
        if where <= {path}:
            return GiveBias(site=site, path=path, reason=reason, channels=channels)
        calls = [self._forwards.call(self._regions[node], node) for node in absorber.nodes]
        (graph,) = {path for path, _ in calls}
        return GiveBias(
            site=site,
            path=graph,
            reason=reason,
            channels=channels,
            nodes=tuple(call.name for _, call in calls),
            owner=path.removeprefix(f"{graph}."),
        )


def _padded(site: str, absorber: Absorber, reason: str) -> AddPaddedShift:
    assert absorber.around is not None and isinstance(absorber.shift, float)
    return AddPaddedShift(
        site=site,
        path=absorber.path,
        reason=reason,
        norm=site,
        channel_index=absorber.channel_index,
        times=absorber.shift,
        inverse=absorber.inverse,
        around=absorber.around,
    )


def _shares(site: str, absorber: Absorber, reason: str, affine: Affine) -> list[FoldIntoTensor]:
    def fold_sites(tensor: str, role: str) -> FoldIntoTensor:
        channel_index = absorber.bias_index if role == "bias" else absorber.channel_index
        assert channel_index is not None
        return FoldIntoTensor(
            site=site,
            path=absorber.path,
            reason=reason,
            tensor=tensor,
            role=role,  # type: ignore[arg-type]
            channel_index=channel_index,
            shift=absorber.shift,
            offset=absorber.offset,
            inverse=absorber.inverse,
            given=role != "weight" and absorber.gives_bias,
            weight=absorber.weight,
            **affine,
        )

    if absorber.side == "value":
        return [fold_sites(absorber.weight, "value")]
    shares = [fold_sites(absorber.weight, "weight")]
    if absorber.bias is not None:
        shares.append(fold_sites(absorber.bias, "bias" if absorber.side == "out" else "input_bias"))
    return shares


def carrying(edits: Iterable[Edit]) -> list[tuple[str, str]]:
    """What carries an affine after `edits`, as (module path, tensor name), in an order to bake."""
    shares = [edit for edit in edits if isinstance(edit, FoldIntoTensor)]
    shares.sort(key=lambda share: share.role != "input_bias")
    return list(dict.fromkeys((share.path, share.tensor) for share in shares))


def is_folded(model: nn.Module, site: NormSite) -> bool:
    """Whether a weight computes the affine of `site` already (tune mode)."""
    return bool(site.paths) and bool(getattr(model.get_submodule(site.name), "folded", False))


def carriers(model: nn.Module) -> defaultdict[nn.Module, list[tuple[str, str]]]:
    """The tensors that carry the affine of each normalization in tune mode.

    As (module path, tensor name), by the module of the normalization.
    """
    found = defaultdict[nn.Module, list[tuple[str, str]]](list)
    for path, module in model.named_modules():
        for tensor in parametrized_tensors(module):
            for share in chain_of(module, tensor):
                if isinstance(share, AffineParametrization):
                    found[share.norm].append((path, tensor))
    return found
