"""Move the affine of BatchNorms with fixed statistics into the weights before them.

The common part of a fold and of freezing in tune mode: for each site the edits that freeze it, make
room for a bias, and put the two parametrizations on the weight and bias that absorb it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from normswap.graph.affine import Absorber, Backward
from normswap.graph.capture import Capture
from normswap.graph.norm_modules import Unsupported
from normswap.graph.sites import NormSite, find_sites
from normswap.norms.batch.frozen import check_statistics
from normswap.norms.weight.frozen_affine import FrozenAffineBias, FrozenAffineWeight
from normswap.passes.edits import AbsorbAffine, Edit, FreezeStatistics, GiveBias
from normswap.passes.edits.parametrized import chain_of, parametrized_tensors


@dataclass(frozen=True)
class Absorbed:
    """A site whose affine weights can carry: who carries it, and the edits that make it so."""

    site: NormSite
    absorbers: tuple[Absorber, ...]
    edits: tuple[Edit, ...]


def absorb(
    model: nn.Module,
    seen: Capture,
    sites: Sequence[NormSite],
    *,
    training: Capture | None = None,
    chain: bool = True,
) -> tuple[list[Absorbed], list[tuple[NormSite, str]]]:
    """Plan the absorption of every site that allows it; the others come with the reason.

    Args:
        training: a capture of training mode, where it must be exact in that mode too.
        chain: an affine may move on through a site that was absorbed before it.

    Raises:
        NormswapError: running statistics that cannot be used (NaN, negative variance).
    """
    done: list[Absorbed] = []
    left: list[tuple[NormSite, str]] = []
    backward = Backward(model, seen, training=training is not None)
    in_training = None if training is None else _InTraining(model, training)
    given: set[str] = set()
    for site in sites:
        try:
            found = backward.absorbers(site)
            if in_training is not None:
                in_training.check(site, found)
        except Unsupported as reason:
            left.append((site, str(reason)))
            continue
        if chain:
            backward.moved(site)
        check_statistics(model.get_submodule(site.name), site.name)
        # The bias that a BatchNorm before this one was given has come to stay.
        found = tuple(replace(a, gives_bias=a.gives_bias and a.path not in given) for a in found)
        given |= {absorber.path for absorber in found}
        done.append(Absorbed(site, found, _edits(site, found)))
    return done, left


class _InTraining:
    """The same absorbers must be found in the graph of training mode.

    What acts in training alone (stochastic depth, an auxiliary loss) is not in eval mode's graph.
    """

    def __init__(self, model: nn.Module, seen: Capture) -> None:
        self._sites = {site.name: site for site in find_sites(model, seen)}
        self._backward = Backward(model, seen, training=True)

    def check(self, site: NormSite, found: tuple[Absorber, ...]) -> None:
        same_site = self._sites[site.name]
        try:
            in_training = self._backward.absorbers(same_site)
        except Unsupported as reason:
            raise Unsupported(f"in training {reason}") from reason
        if set(in_training) != set(found):
            raise Unsupported("follows another module in training")
        self._backward.moved(same_site)


def _edits(site: NormSite, found: tuple[Absorber, ...]) -> tuple[Edit, ...]:
    edits: list[Edit] = [
        FreezeStatistics(
            site=site.name,
            path=site.name,
            reason=f"its affine moves into {', '.join(a.path for a in found)}",
            absorbed=True,
            tail=site.tail,
        )
    ]
    for absorber in found:
        path, reason = absorber.path, f"carries the affine of {site.name}"
        if absorber.gives_bias:
            assert site.num_features is not None
            edits.append(
                GiveBias(site=site.name, path=path, reason=reason, channels=site.num_features)
            )
        for role, tensor in (("weight", absorber.weight), ("bias", absorber.bias)):
            edits.append(
                AbsorbAffine(
                    site=site.name,
                    path=path,
                    reason=reason,
                    tensor=tensor,
                    role=role,  # type: ignore[arg-type]
                    norm=site.name,
                    groups=absorber.groups,
                    given=role == "bias" and absorber.gives_bias,
                )
            )
    return tuple(edits)


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
        if isinstance(share, (FrozenAffineWeight, FrozenAffineBias)) and share.norm is norm
    ]
