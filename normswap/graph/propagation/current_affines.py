"""The affines of a captured model's BatchNorms in numbers, as they are after the folds so far."""

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from normswap.graph.aliases import AliasAnalysis
from normswap.graph.index import Index, own_tensors
from normswap.graph.propagation.absorbers import Absorber
from normswap.graph.propagation.owners import Owners
from normswap.graph.propagation.scale_shift import ScaleShift, digest_of, numbers_of
from normswap.graph.sites import NormSite


class CurrentAffines:
    """The affine of each BatchNorm, and the constants that stay what they are.

    Args:
        aliases: what shares memory by now, by graph.
        fixed: the numbers stay as they are; otherwise none is known.

    Attributes:
        consulted: the constants whose numbers were asked for, by name, each with its digest.
    """

    def __init__(
        self,
        index: Index,
        owners: Owners,
        aliases: Mapping[fx.Graph, AliasAnalysis],
        *,
        fixed: bool,
    ) -> None:
        self._index, self._owners, self._aliases, self._fixed = index, owners, aliases, fixed
        self.consulted: dict[str, str] = {}
        self._read: dict[str, ScaleShift | None] = {}  # of sites, as their modules have them
        self._written: set[int] = set()  # ids of the tensors that have folded in an affine
        self._changed: dict[str, ScaleShift | None] = {}  # of sites that folded in another's

    def of(self, site: NormSite) -> ScaleShift | None:
        """The affine of `site` by now; None where the numbers will change or are not known."""
        if not self._fixed:
            return None
        return self._changed[site.name] if self.has_changed(site) else self._own(site)

    def has_changed(self, site: NormSite) -> bool:
        """Whether `site` has folded in the affine of another."""
        return site.name in self._changed

    def can_change(self, site: NormSite) -> bool:
        """Whether `site` is a BatchNorm that can fold in the affine of another."""
        if not self._fixed or not site.has_fixed_affine or site.why_not:
            return False
        norm = self._index.modules[site.name]
        return self._own(site) is not None and not norm._forward_pre_hooks

    def constant(self, node: fx.Node) -> Tensor | None:
        """The numbers of a constant in float64, where they are the same for good."""
        tensor = self._owners.constant(node) if self._fixed else None
        if tensor is None or tensor.is_meta or id(tensor) in self._written:
            return None
        region = self._index.region_of[node]
        if self._aliases[region.graph].writes(node):
            return None
        if node in region.tensors:
            self.consulted[region.tensors[node]] = digest_of(tensor)
        return tensor.detach().double().cpu()

    def folded(self, absorber: Absorber, numbers: ScaleShift | None, into: NormSite | None) -> None:
        """Note that `absorber` folds in an affine of these numbers.

        Args:
            into: the BatchNorm that the absorber is, where it is one.
        """
        own = dict(own_tensors(self._index.modules[absorber.path]))
        taking = (absorber.weight, absorber.bias)
        self._written |= {id(tensor) for name, tensor in own.items() if name in taking}
        if into is None:
            return
        before, channels = self.of(into), absorber.channel_index.channels
        assert channels is not None
        self._changed[into.name] = (
            None
            if before is None or numbers is None
            else before.with_another(
                numbers,
                torch.tensor(channels),
                before=absorber.side == "in",
                inverse=absorber.inverse,
                times=absorber.shift,
                offset=absorber.offset,
            )
        )

    def _own(self, site: NormSite) -> ScaleShift | None:
        if site.name not in self._read:
            self._read[site.name] = numbers_of(self._index.modules[site.name])
        return self._read[site.name]
