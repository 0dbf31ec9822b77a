"""Move the affine of BatchNorms with fixed statistics into the weights around them.

The common part of a fold and of freezing in tune mode: for each site the edits that freeze it, make
room for a bias, and put parametrizations on the weights and biases that absorb it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod

from torch import nn

from normswap.graph.affine.absorber import Absorber
from normswap.graph.affine.affines import Affines
from normswap.graph.capture import Capture
from normswap.graph.norm_modules import Unsupported
from normswap.graph.parametrized import chain_of, parametrized_tensors
from normswap.graph.sites import NormSite, find_sites
from normswap.norms.batch.frozen import check_statistics
from normswap.norms.weight.frozen_affine import Share
from normswap.passes.edits import (
    AbsorbAffine,
    Edit,
    FreezeStatistics,
    GiveBias,
    GiveCallBias,
    StatisticsIntoAffine,
)
from normswap.passes.forwards import Forwards


@dataclass(frozen=True)
class Absorbed:
    """A site whose affine weights can carry: who carries it, and the edits that make it so."""

    site: NormSite
    absorbers: tuple[Absorber, ...]
    edits: tuple[Edit, ...]

    @property
    def tensors(self) -> list[tuple[str, str]]:
        """What carries it, as (module path, tensor name), in an order in which it can be baked."""
        return carrying(self.edits)


@dataclass
class Absorption:
    """What `absorb` decided.

    Attributes:
        done: the sites that weights can carry.
        stuck: those that an operator stops, with the reason.
        unknown: those that are no affine, or not fully seen, with the reason.
    """

    done: list[Absorbed] = field(default_factory=list)
    stuck: list[tuple[NormSite, str]] = field(default_factory=list)
    unknown: list[tuple[NormSite, str]] = field(default_factory=list)

    @property
    def left(self) -> list[tuple[NormSite, str]]:
        """All that are not absorbed."""
        return [*self.unknown, *self.stuck]


def absorb(
    model: nn.Module,
    seen: Capture,
    every: Sequence[NormSite],
    sites: Sequence[NormSite],
    *,
    training: Capture | None = None,
    fixed: bool = True,
    inverse: bool = False,
    chain: bool = True,
    late: bool = True,
) -> Absorption:
    """Plan the absorption of every one of `sites` that allows it.

    Args:
        every: all sites of the model.
        training: a capture of training mode, where it must be exact in that mode too.
        fixed: the numbers stay as they are, so that what is absorbed may depend on them.
        inverse: what is left then may be absorbed while others take it back.
        chain: an affine may move on through a site that was absorbed before it.
        late: an affine may also move into what follows.

    Raises:
        NormswapError: running statistics that cannot be used (NaN, negative variance).
    """
    tuned = training is not None
    affines = Affines(model, seen, every, fixed=fixed, training=tuned, late=late)
    in_training = None if training is None else _InTraining(model, training)
    writer, result, open_sites = Writer(model, seen), Absorption(), []
    for site in sites:
        try:
            affines.check(site)
            open_sites.append(site)
        except Unsupported as reason:
            result.unknown.append((site, str(reason)))
    reasons: dict[str, str] = {}  # the first one of each
    for taken_back in (False, True) if inverse else (False,):
        result.stuck = []
        for site in open_sites:
            try:
                found = affines.absorbers(site, inverse=taken_back)
                if in_training is not None:
                    in_training.check(site, found)
                edits = writer.edits(site, found)
            except Unsupported as reason:
                result.stuck.append((site, reasons.setdefault(site.name, str(reason))))
                continue
            affines.moved(site, found, passed=chain)
            check_statistics(model.get_submodule(site.name), site.name)
            result.done.append(Absorbed(site, found, edits))
        open_sites = [site for site, _ in result.stuck]
    return result


class _InTraining:
    """The same absorbers must be found in the graph of training mode.

    What acts in training alone (stochastic depth, an auxiliary loss) is not in eval mode's graph.
    """

    def __init__(self, model: nn.Module, seen: Capture) -> None:
        sites = find_sites(model, seen)
        self._sites = {site.name: site for site in sites}
        self._affines = Affines(model, seen, sites, fixed=False, training=True)

    def check(self, site: NormSite, found: tuple[Absorber, ...]) -> None:
        same_site = self._sites[site.name]
        try:
            in_training = self._affines.absorbers(same_site)
        except Unsupported as reason:
            raise Unsupported(f"in training {reason}") from reason
        if set(in_training) != set(found):
            raise Unsupported("follows another module in training")
        self._affines.moved(same_site, found)


class Writer:
    """Writes down as edits what was decided."""

    def __init__(self, model: nn.Module, seen: Capture) -> None:
        self._seen, self._forwards = seen, Forwards(model, seen, None)
        self._regions = {node: region for region in seen.regions for node in region.graph.nodes}

    def edits(self, site: NormSite, found: tuple[Absorber, ...]) -> tuple[Edit, ...]:
        """The edits by which `found` take up `site`.

        Raises:
            Unsupported: a bias cannot be given.
        """
        names = ", ".join(dict.fromkeys(absorber.path for absorber in found))
        edits: list[Edit] = [
            FreezeStatistics(
                site=site.name,
                path=site.name,
                reason=f"its affine moves into {names}",
                absorbed=True,
                tail=site.tail,
            )
        ]
        return (*edits, *self.absorbing(site.name, found))

    def absorbing(self, site: str, found: Sequence[Absorber]) -> list[Edit]:
        """The edits by which `found` take up the affine that the module at `site` has.

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
            if absorber.gives_bias:
                edits.append(self._bias(site, absorber, reason))
            edits += _shares(site, absorber, reason)
        return edits

    def _bias(self, site: str, absorber: Absorber, reason: str) -> Edit:
        assert absorber.bias_slots is not None
        channels, path = prod(absorber.bias_slots.shape), absorber.path
        where = {self._regions[node].module_path(node) for node in absorber.nodes}
        if where <= {path}:
            return GiveBias(site=site, path=path, reason=reason, channels=channels)
        calls = [self._forwards.call(self._regions[node], node) for node in absorber.nodes]
        (graph,) = {path for path, _ in calls}
        return GiveCallBias(
            site=site,
            path=graph,
            reason=reason,
            nodes=tuple(call.name for _, call in calls),
            owner=path.removeprefix(f"{graph}."),
            channels=channels,
        )


def _shares(site: str, absorber: Absorber, reason: str) -> list[AbsorbAffine]:
    def absorb(tensor: str, role: str) -> AbsorbAffine:
        slots = absorber.bias_slots if role == "bias" else absorber.slots
        assert slots is not None
        return AbsorbAffine(
            site=site,
            path=absorber.path,
            reason=reason,
            tensor=tensor,
            role=role,  # type: ignore[arg-type]
            norm=site,
            slots=slots,
            shift=absorber.shift,
            offset=absorber.offset,
            inverse=absorber.inverse,
            given=role != "weight" and absorber.gives_bias,
            weight=absorber.weight,
        )

    if absorber.side == "value":
        return [absorb(absorber.weight, "value")]
    shares = [absorb(absorber.weight, "weight")]
    if absorber.bias is not None:
        shares.append(absorb(absorber.bias, "bias" if absorber.side == "out" else "input_bias"))
    return shares


def carrying(edits: Iterable[Edit]) -> list[tuple[str, str]]:
    """What carries an affine after `edits`, as (module path, tensor name), in an order to bake."""
    shares = [edit for edit in edits if isinstance(edit, AbsorbAffine)]
    shares.sort(key=lambda share: share.role != "input_bias")
    return list(dict.fromkeys((share.path, share.tensor) for share in shares))


def is_absorbed(model: nn.Module, site: NormSite) -> bool:
    """Whether a weight computes the affine of `site` already (tune mode)."""
    return bool(site.paths) and bool(getattr(model.get_submodule(site.name), "absorbed", False))


def carriers(model: nn.Module, site: NormSite) -> list[tuple[str, str]]:
    """The tensors that carry the affine of `site` in tune mode, as (module path, tensor name)."""
    norm = model.get_submodule(site.name)
    return [
        (path, tensor)
        for path, module in model.named_modules()
        for tensor in parametrized_tensors(module)
        for share in chain_of(module, tensor)
        if isinstance(share, Share) and share.norm is norm
    ]
