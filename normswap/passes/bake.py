"""Bake parametrizations: every parametrized tensor becomes a plain one with its present value.

Rules:
1. Every parametrization goes, whoever put it there, and every hook of torch's older weight_norm
   and spectral_norm, and of its pruning, whose masks are multiplied in.
2. A frozen BatchNorm whose affine was in one of them has nothing left to do and is removed.
"""

from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from normswap.core.errors import NormswapError
from normswap.graph.capture import capture
from normswap.graph.parametrized import chain_of, parametrized_tensors
from normswap.graph.sites import NormSite, find_sites
from normswap.norms.weight.frozen_affine import FrozenAffineInputBias
from normswap.passes.edits import BakeTensor, Edit, Reduce
from normswap.passes.edits.parametrizations import bake_hooks
from normswap.passes.folding import carriers, is_folded
from normswap.passes.plan import Plan
from normswap.passes.selection import Globs, any_matches, listed, matches


class Bake:
    """Bake every parametrization of the model; see the module's docstring for the rules.

    Args:
        include, exclude: globs on the names of the modules that hold the tensors; by default all.
    """

    def __init__(self, *, include: Globs | None = None, exclude: Globs = ()) -> None:
        self.include, self.exclude = include, exclude

    def __str__(self) -> str:
        return "Bake"

    def plan(self, model: nn.Module, inputs: Any = None) -> Plan:
        """One edit for each parametrized tensor, and one for each norm that this leaves empty.

        A frozen BatchNorm stays in tune mode, with all tensors that carry it, where it is excluded
        or one of them is not selected.
        """
        for glob in listed(self.include):
            if not any_matches((path for path, _ in model.named_modules()), glob):
                raise NormswapError(f"{glob!r} matches no module of this model; name one")
        folded = []
        if any(getattr(module, "folded", False) for module in model.modules()):
            folded = [s for s in find_sites(capture(model)) if is_folded(model, s)]
        by_norm = carriers(model)
        carried = [
            (site, {path for path, _ in by_norm[model.get_submodule(site.name)]}) for site in folded
        ]
        kept = {
            path
            for site, paths in carried
            if matches(site.name, self.exclude) or not all(map(self._selects, paths))
            for path in paths
        }
        edits: list[Edit] = [edit for edit in bake_hooks(model) if self._selects(edit.path)]
        for path, module in model.named_modules():
            if path not in kept and self._selects(path):
                names = [(path, name) for name in parametrized_tensors(module)]
                edits += bake_edits(in_order(model, names), path)
        edits += [remove(site) for site, paths in carried if kept.isdisjoint(paths)]
        return Plan(passes=(str(self),), edits=tuple(edits))

    def _selects(self, path: str) -> bool:
        included = self.include is None or matches(path, self.include)
        return included and not matches(path, self.exclude)


def bake_edits(tensors: Iterable[tuple[str, str]], site: str) -> list[BakeTensor]:
    """The edits that bake `tensors`, given as (module path, tensor name), on behalf of `site`."""
    return [
        BakeTensor(site=site, path=path, tensor=tensor, reason=f"its {tensor} is parametrized")
        for path, tensor in tensors
    ]


def in_order(model: nn.Module, tensors: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The tensors in an order to bake them in: a bias before the weight that it reads."""
    return sorted(tensors, key=lambda tensor: not _reads_another(model, *tensor))


def _reads_another(model: nn.Module, path: str, tensor: str) -> bool:
    """Whether a parametrization of the tensor reads one of another, which has to stay till then."""
    module = model.get_submodule(path)
    return any(isinstance(share, FrozenAffineInputBias) for share in chain_of(module, tensor))


def reduce_to(to: Literal["affine", "shift", "identity"], site: NormSite, reason: str) -> Reduce:
    """The edit that leaves of a site what no weight computes."""
    return Reduce(
        site=site.name,
        path=site.name,
        reason=reason,
        to=to,
        aliases=site.paths,
        num_features=site.num_features,
        tail=site.tail,
    )


def remove(site: NormSite) -> Reduce:
    """The edit that takes a site away once a weight computes it."""
    return reduce_to("identity", site, "its affine is in the weight")
