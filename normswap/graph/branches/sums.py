"""Sums of parallel branches that are all linear in one value, found on the captured graph.

y = conv_1(x) + scale * (bn(x) - conv_2(x)) + x, in any order and nesting, is one convolution of x:
the blocks of RepVGG (arXiv 2101.03697), MobileOne (2206.04040), FastViT (2303.14189), RepViT
(2307.09283) and their kin, whatever their classes are called. `find_sums` reads each such sum as a
tree: at its leaves convs, Linears and x itself, inside sums, products with constants and BatchNorms
in eval mode. Every value in it has a single use, so that nobody sees it change.

`Branches` says whether one module can compute a sum of branches, and which one.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from torch import fx, nn

from normswap.core.compat import AnyBatchNorm
from normswap.core.errors import Unsupported
from normswap.graph.branches.linear import Linear, Reader
from normswap.graph.branches.taps import CONVS, identity_taps, merged_taps, taps_of
from normswap.graph.capture import Capture
from normswap.graph.functional_norms import functional_kind
from normswap.graph.index import Index, Region
from normswap.graph.norm_modules import norm_kind
from normswap.graph.operators.pointwise import is_same
from normswap.graph.operators.rule import argument, shape_of
from normswap.graph.sites import Call, NormSite, describe, find_sites


@dataclass(frozen=True, eq=False)
class BranchSum:
    """A sum of two or more branches, the largest whose branches are linear in one value."""

    region: Region
    value: Linear
    index: Index

    def path(self, node: fx.Node) -> str:
        """The module that `node` ran in, by the first of its paths."""
        return self.index.first_path(self.region.module_path(node))

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


def find_sums(seen: Capture) -> list[BranchSum]:
    """The sums whose branches are linear in one value, in order of execution."""
    norms = _norms(seen)
    found = [
        BranchSum(region, value, seen.index)
        for region in reversed(seen.regions)
        if not region.symbolic
        for root in Reader(region, seen.index.aliases(region), norms).roots()
        for value in _of_one_source(root)
    ]
    return found[::-1]


def sums_inside(found: BranchSum) -> list[BranchSum]:
    """The sums of which a sum consists."""
    parts = [part.value for part in found.value.parts]
    inside = [each for part in parts for each in _of_one_source(part)]
    return [BranchSum(found.region, each, found.index) for each in inside]


def _norms(seen: Capture) -> dict[fx.Node, tuple[NormSite, Call]]:
    """The calls of BatchNorms that are an affine per channel, by their output."""
    found = {}
    for site in find_sites(seen):
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


class Branches:
    """The convs (or Linears) of a sum, and whether one of them can compute it all.

    Raises:
        Unsupported: none can, for the reason that the message gives.

    Attributes:
        sum: the sum.
        axis: of the channels.
        channels: of the input.
    """

    def __init__(self, found: BranchSum) -> None:
        self.sum = found
        leaves = found.value.leaves()
        weighted = {leaf: self._module(leaf) for leaf in leaves if leaf.kind == "weighted"}
        taps = {leaf: taps_of(module) for leaf, module in weighted.items()}
        axes = {len(each.size) for each in taps.values()}
        linear = any(isinstance(module, nn.Linear) for module in weighted.values())
        rank = len(shape_of(found.value.node))
        if len(axes) > 1 or not (linear or axes <= {rank - 2}):
            raise Unsupported("its branches have their channels on different axes")
        self.axis = rank - 1 if linear else 1
        if self.axis != 1 and any(value.norm for value in found.value.tree()):
            raise Unsupported("it normalizes another axis than the outputs of its Linears")
        assert found.value.source is not None
        self.channels = shape_of(found.value.source)[self.axis]
        identity = identity_taps(max(axes, default=0), self.channels)
        strides = {getattr(module, "stride", identity.size) for module in weighted.values()}
        if len(weighted) < len(leaves):
            strides.add(identity.size)
        if len(strides) > 1:
            raise Unsupported("its branches have different strides")
        every = [taps.get(leaf, identity) for leaf in leaves]
        whole = merged_taps(every)
        one, several = whole.work(self.channels), sum(t.work(self.channels) for t in every)
        if one > several:
            raise Unsupported(
                f"one convolution takes {one} multiplications for a number, its branches {several}"
            )
        # Torch's own forward takes any kernel and a new bias; others may depend on them.
        self._able = [
            leaf
            for leaf, module in weighted.items()
            if _has_own_forward(module) or (taps[leaf] == whole and module.bias is not None)
        ]
        # Those that change least come first.
        self._able.sort(key=lambda leaf: (taps[leaf] != whole, -prod(taps[leaf].size)))
        if not weighted:
            self._able = [value for value in found.value.tree() if self._takes_any_affine(value)]

    def path(self, value: Linear) -> str:
        """The module that computes a value."""
        return value.norm[0].name if value.norm else self.sum.path(value.node)

    def able(self) -> list[Linear]:
        """Those that could compute the sum, the one that changes least first."""
        return self._able

    def _module(self, leaf: Linear) -> nn.Module:
        region, path = self.sum.region, self.path(leaf)
        module = self.sum.index.modules[path]
        if not isinstance(module, (*CONVS, nn.Linear)):
            raise Unsupported(
                f"{describe(leaf.node, region)} is the call of no conv or Linear module"
            )
        # A parametrized weight is computed, and no parameter of the module.
        if (
            argument(leaf.node, "weight") not in region.tensors
            or "weight" not in module._parameters
        ):
            raise Unsupported(f"{path} computes its weight; bake it first")
        if isinstance(module, CONVS) and any(
            not _is_called_with(leaf.node, name, getattr(module, name))
            for name in ("stride", "padding", "dilation", "groups")
        ):
            raise Unsupported(f"{path} does not compute as its attributes say")
        return module

    def _takes_any_affine(self, value: Linear) -> bool:
        """Whether it is a norm of the source that can be any affine per channel."""
        if value.norm is None or value.parts[0].value.kind != "source":
            return False
        norm = self.sum.index.modules[value.norm[0].name]
        plain = isinstance(norm, AnyBatchNorm) and not hasattr(norm, "eval_affine")
        return plain or norm_kind(norm) == "affine"


def _has_own_forward(module: nn.Module) -> bool:
    cls = next(cls for cls in (*CONVS, nn.Linear) if isinstance(module, cls))
    same = (
        getattr(type(module), name, None) is getattr(cls, name, None)
        for name in ("forward", "_conv_forward")
    )
    return all(same) and "forward" not in vars(module)


def _is_called_with(node: fx.Node, name: str, value: Any) -> bool:
    given = argument(node, name)
    if isinstance(given, (list, tuple)):
        given = tuple(given) * (len(value) // len(given))
    return bool(given == value)
