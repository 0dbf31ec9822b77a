"""Fold frozen statistics into the weights before them, for inference.

Rules:
1. A BatchNorm with running statistics goes into the conv or Linear that produces its input, through
   operators that do nothing in eval mode, where `normswap.graph.affine` shows that this is exact.
2. It is built as tune mode and then baked: freeze, parametrize weight and bias, bake, remove.
3. What cannot be folded stays as it is, with the reason.
4. A site that tune mode has moved already is baked and removed.

The arithmetic is in float64 and cast back to the weight's own dtype.
"""

from typing import Any

from torch import nn

from normswap.graph.capture import capture
from normswap.graph.sites import find_sites
from normswap.passes.absorb import absorb, carriers, is_absorbed
from normswap.passes.bake import bake_edits, remove
from normswap.passes.edits import Edit
from normswap.passes.plan import Left, Plan
from normswap.passes.selection import Globs, select


class Fold:
    """Fold the selected BatchNorms; see the module's docstring for the rules."""

    def __init__(self, *, include: Globs | None = None, exclude: Globs = ()) -> None:
        self.include, self.exclude = include, exclude

    def __str__(self) -> str:
        return "Fold"

    def plan(self, model: nn.Module, inputs: Any = None) -> Plan:
        """The edits for each site that can be folded.

        Raises:
            NormswapError: no site is selected, or statistics are NaN or negative.
        """
        seen = capture(model, inputs)
        selected, others = select(find_sites(model, seen), self.include, self.exclude)
        moved = [site for site in selected if is_absorbed(model, site)]
        absorbed, unfoldable = absorb(model, seen, [site for site in selected if site not in moved])
        edits: list[Edit] = []
        for site in moved:
            edits += [*bake_edits(carriers(model, site), site.name), remove(site)]
        for each in absorbed:
            edits += each.edits
            tensors = [(a.path, name) for a in each.absorbers for name in (a.weight, a.bias)]
            edits += bake_edits(tensors, each.site.name)
            edits.append(remove(each.site))
        left = [Left(site=site.name, reason=why) for site, why in (*others, *unfoldable)]
        return Plan(passes=(str(self),), edits=tuple(edits), left=tuple(left))
