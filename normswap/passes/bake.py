"""Bake parametrizations: every parametrized tensor becomes a plain one with its present value.

Rules:
1. Every parametrization goes, whoever put it there.
2. A frozen BatchNorm whose affine was in one of them has nothing left to do and is removed.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from normswap.graph.capture import capture
from normswap.graph.sites import NormSite, find_sites
from normswap.passes.absorb import is_absorbed
from normswap.passes.edits import BakeTensor, Edit, ToIdentity
from normswap.passes.edits.parametrized import parametrized_tensors
from normswap.passes.plan import Plan


class Bake:
    """Bake every parametrization of the model; see the module's docstring for the rules."""

    def __str__(self) -> str:
        return "Bake"

    def plan(self, model: nn.Module, inputs: Any = None) -> Plan:
        """One edit for each parametrized tensor, and one for each norm that this leaves empty."""
        edits: list[Edit] = []
        for path, module in model.named_modules():
            edits += bake_edits([(path, name) for name in parametrized_tensors(module)], path)
        sites = find_sites(model, capture(model))
        edits += [remove(site) for site in sites if is_absorbed(model, site)]
        return Plan(passes=(str(self),), edits=tuple(edits))


def bake_edits(tensors: Iterable[tuple[str, str]], site: str) -> list[BakeTensor]:
    """The edits that bake `tensors`, given as (module path, tensor name), on behalf of `site`."""
    return [
        BakeTensor(site=site, path=path, tensor=tensor, reason="is parametrized")
        for path, tensor in tensors
    ]


def remove(site: NormSite) -> ToIdentity:
    """The edit that takes a site away once a weight computes it."""
    return ToIdentity(
        site=site.name,
        path=site.name,
        aliases=site.paths,
        reason="its affine is in the weight",
        tail=site.tail,
    )
