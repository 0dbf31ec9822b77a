"""Sums of parallel branches that are all linear in one value, found on the captured graph.

y = conv_1(x) + scale * (bn(x) - conv_2(x)) + x, in any order and nesting, is one convolution of x:
the blocks of RepVGG (arXiv 2101.03697), MobileOne (2206.04040), FastViT (2303.14189), RepViT
(2307.09283) and their kin, whatever their classes are called. `find_sums` reads each such sum as a
tree: at its leaves convs, Linears and x itself, inside sums, products with constants and BatchNorms
in eval mode. Every value in it has a single use, so that nobody sees it change.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import fx, nn

from normswap.graph.branches.linear import Linear, Reader
from normswap.graph.capture import Capture, Region
from normswap.graph.functional import functional_kind
from normswap.graph.operators.pointwise import is_same
from normswap.graph.sites import Call, NormSite, find_sites


@dataclass(frozen=True, eq=False)
class Sum:
    """A sum of two or more branches, the largest whose branches are linear in one value.

    Attributes:
        names: the first path of each module, by any of its paths.
    """

    region: Region
    value: Linear
    names: Mapping[str, str]

    def path(self, node: fx.Node) -> str:
        """The module that `node` ran in, by the first of its paths."""
        path = self.region.module_path(node)
        return self.names.get(path, path)

    @cached_property
    def nodes(self) -> frozenset[fx.Node]:
        """The nodes of all its operators."""
        return frozenset().union(*(value.nodes for value in self.value.tree()))

    @property
    def code(self) -> tuple[tuple[str, str], ...]:
        """The operators and where they run, which are the same in every call of the same code."""
        return tuple(
            (value.kind, "" if value.kind == "source" else self.path(value.node))
            for value in self.value.tree()
        )


def find_sums(model: nn.Module, seen: Capture) -> list[Sum]:
    """The sums whose branches are linear in one value, in order of execution."""
    norms = _norms(model, seen)
    first = {module: path for path, module in model.named_modules()}
    names = {path: first[each] for path, each in model.named_modules(remove_duplicate=False)}
    found = [
        Sum(region, value, names)
        for region in reversed(seen.regions)
        if not region.symbolic
        for root in Reader(region, norms).roots()
        for value in _of_one_source(root)
    ]
    return found[::-1]


def sums_inside(found: Sum) -> list[Sum]:
    """The sums of which a sum consists."""
    parts = [part.value for part in found.value.parts]
    inside = [each for part in parts for each in _of_one_source(part)]
    return [Sum(found.region, each, found.names) for each in inside]


def _norms(model: nn.Module, seen: Capture) -> dict[fx.Node, tuple[NormSite, Call]]:
    """The calls of BatchNorms that are an affine per channel, by their output."""
    found = {}
    for site in find_sites(model, seen):
        fixed = site.kind == "affine" or site.has_fixed_affine
        if not fixed or not site.paths or site.why_not is not None or site.channel_axis != 1:
            continue
        for call in site.executions:
            inert = all(functional_kind(n) == "batch" or is_same(n) for n in call.nodes)
            if call.input is not None and call.output is not None and (inert or not site.tail):
                found[call.output] = (site, call)
    return found


def _of_one_source(value: Linear) -> list[Linear]:
    """The largest parts of a tree that add up branches of one source."""
    if value.source is None:
        return [each for part in value.parts for each in _of_one_source(part.value)]
    leaves = value.leaves()
    computes = any(each.kind in ("weighted", "norm") for each in value.tree())
    return [value] if len(leaves) > 1 and computes else []
