"""Replace BatchNorms by mean-only ones, their scale moved into the weights before.

Rules:
1. In the place of a BatchNorm with running statistics comes a mean-only one (Salimans & Kingma
   2016, arXiv 1602.07868, section 4), where `normswap.graph.propagation` shows that its scale can
   be folded into the weight before it exactly; elsewhere it is left, with the reason.
2. A bias before it folds in the shift as well; none is made for that, because the mean of the batch
   is subtracted anyway.
3. With weight_norm these weights are then given as g v / ||v||, as in the paper.

In eval mode the function stays.
"""

from typing import Any

from torch import nn

from normswap.graph.capture import capture
from normswap.graph.sites import find_sites
from normswap.norms.registry import check_options, method_named
from normswap.passes.bake import bake_edits
from normswap.passes.edits import Edit, FoldIntoTensor, GiveBias, ParametrizeTensor, ReplaceModule
from normswap.passes.folding import FoldedSite, carrying, fold_sites, is_folded
from normswap.passes.plan import Plan, Skipped
from normswap.passes.selection import Globs, select

CENTERING = "mean_only_batch_norm"


class Reweight:
    """Replace the selected BatchNorms by `to`; see the module's docstring for the rules.

    Args:
        to: "mean_only_batch_norm" or "weight_norm".
        include, exclude: globs on site names; by default every BatchNorm.
        options: of the method.
    """

    def __init__(
        self, to: str, *, include: Globs | None = None, exclude: Globs = (), **options: Any
    ) -> None:
        self.method = method_named(to)
        check_options(self.method, options)
        self.include, self.exclude, self.options = include, exclude, options

    def __str__(self) -> str:
        return f"Reweight({self.method.name})"

    def plan(self, model: nn.Module, inputs: Any = None) -> Plan:
        """The edits for each site whose scale can move.

        Raises:
            NormswapError: no site is selected, or statistics are NaN or negative.
        """
        seen = capture(model, inputs)
        sites = find_sites(seen)
        selected, others = select(sites, self.include, self.exclude)
        moved = [site for site in selected if is_folded(model, site)]
        others += [
            (site, "is computed by a weight (tune mode); unfreeze it first") for site in moved
        ]
        open_sites = [site for site in selected if site not in moved]
        # What replaces a site centers the batch in training, so that no other affine moves past it.
        found = fold_sites(seen, sites, open_sites, fixed=False, chain=False, downstream=False)
        edits: list[Edit] = []
        for each in found.done:
            edits += self._edits(model, each)
        left = [Skipped(site=site.name, reason=why) for site, why in (*others, *found.left)]
        return Plan(passes=(str(self),), edits=tuple(edits), left=tuple(left))

    def _edits(self, model: nn.Module, each: FoldedSite) -> list[Edit]:
        site = each.site
        assert site.num_features is not None
        biased = not all(absorber.gives_bias for absorber in each.absorbers)
        edits = [edit for edit in each.edits if biased or not _of_a_new_bias(edit)]
        edits += bake_edits(carrying(edits), site.name)
        momentum = getattr(model.get_submodule(site.name), "momentum", 0.1)
        own = self.options if self.method.name == CENTERING else {}
        edits.append(
            ReplaceModule(
                site=site.name,
                path=site.name,
                reason=f"its scale moves into {', '.join(a.path for a in each.absorbers)}",
                aliases=site.paths,
                method=CENTERING,
                num_features=site.num_features,
                channel_axis=site.channel_axis,
                options={"affine": site.affine, "momentum": momentum, **own},
                tail=site.tail,
                shift_folded=biased,
            )
        )
        if self.method.name != CENTERING:
            for absorber in each.absorbers:  # what it objects to is better known now
                layer = model.get_submodule(absorber.path)
                self.method.made(layer, absorber.weight, **self.options)
            edits += [
                ParametrizeTensor(
                    site=site.name,
                    path=absorber.path,
                    reason=f"carries the scale of {site.name}",
                    tensor=absorber.weight,
                    method=self.method.name,
                    options=self.options,
                )
                for absorber in each.absorbers
            ]
        return edits


def _of_a_new_bias(edit: Edit) -> bool:
    return isinstance(edit, GiveBias) or (isinstance(edit, FoldIntoTensor) and edit.given)
