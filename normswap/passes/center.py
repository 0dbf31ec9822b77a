"""LayerNorm becomes RMSNorm, exactly: its mean is taken off earlier, by weights.

Jiang et al. 2023 (arXiv 2305.14858): LayerNorm(x) = RMSNorm(x - mean(x)), and where linear layers
add up to x, their weights and biases can take the mean off.

Rules:
1. A LayerNorm over the channels becomes an RMSNorm with the same gain and bias where all that
   computes its input can be centered and nothing else sees that (`graph.propagation.projection`).
2. Weights, biases and constants are centered once, in float64. With `trainable` they are centered
   anew whenever they are used: the same function of the same parameters, so that any optimizer
   takes the same steps. What does not commute while the model trains (dropout, a gain per channel
   on the way) then stops it.
3. What no weight can center is centered explicitly, where that frees at least two LayerNorms.
4. Every other LayerNorm stays, with the reason.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from normswap.core.errors import Unsupported
from normswap.graph.capture import capture
from normswap.graph.centerings import Centering, Centerings
from normswap.graph.norm_modules import formula
from normswap.graph.sites import NormSite, find_sites
from normswap.passes.edits import Edit
from normswap.passes.edits.centering import CenterOutput, CenterTensor
from normswap.passes.edits.modules import ReplaceModule
from normswap.passes.modularize import modularized_first
from normswap.passes.plan import Plan, Skipped
from normswap.passes.selection import Globs, select


class Center:
    """Turn the selected LayerNorms into RMSNorms; see the module's docstring for the rules.

    Args:
        include, exclude: globs on site names; by default every LayerNorm.
        trainable: it holds while the model trains.
        assume_example: the model is called in no other way than in the example.
    """

    def __init__(
        self,
        *,
        include: Globs | None = None,
        exclude: Globs = (),
        trainable: bool = False,
        assume_example: bool = False,
    ) -> None:
        self.include, self.exclude, self.trainable = include, exclude, trainable
        self.assume_example = assume_example

    def __str__(self) -> str:
        return "Center(trainable)" if self.trainable else "Center"

    def plan(self, model: nn.Module, inputs: Any = None) -> Plan:
        """The edits that free each LayerNorm that can be.

        Raises:
            NormswapError: the model has no LayerNorm, or none is selected.
        """
        seen = capture(model, inputs)
        sites = find_sites(seen)
        selected, others = select(sites, self.include, self.exclude, kinds=("layer",))
        whole, as_calls = modularized_first(self, seen, selected, inputs, other_kinds=True)
        if whole is not None:
            return whole
        selected = [site for site in selected if site.owner == "module"]
        left = [
            Skipped(site=s.name, reason=why) for s, why in others if s.kind == "layer"
        ] + as_calls
        reasons = {site.name: _why_not(model, site) for site in selected}
        wanted = [site for site in selected if reasons[site.name] is None]
        left += [Skipped(site=name, reason=why) for name, why in reasons.items() if why is not None]
        eval_mode = Centerings(seen, sites, wanted, assume_example=self.assume_example)
        training = None
        if self.trainable:
            trained = capture(model, inputs, training=True)
            sites = find_sites(trained)
            training = Centerings(trained, sites, wanted, training=True, assume_example=True)
        edits: dict[tuple[str, ...], Edit] = {}  # by what they change, as centerings may overlap
        freed: set[str] = set()
        for site in wanted:
            try:
                if site.name not in freed:
                    centering = _of_both(site, eval_mode, training)
                    freed.update(centering.norms)
                    for edit in _centering(site, centering, self.trainable):
                        edits.setdefault((edit.path, str(edit)), edit)
            except Unsupported as reason:
                left.append(Skipped(site=site.name, reason=str(reason)))
                continue
            edits["replace", site.name] = _without_mean(model, site)
        # A LayerNorm whose output is centered may be an RMSNorm itself: that has to come first.
        in_order = sorted(edits.values(), key=lambda edit: isinstance(edit, CenterOutput))
        return Plan(passes=(str(self),), edits=tuple(in_order), left=tuple(left))


def _why_not(model: nn.Module, site: NormSite) -> str | None:
    """Why `site` could not be an RMSNorm whatever its input is."""
    if site.kind != "layer":
        return f"is {site.kind} normalization; only a LayerNorm becomes an RMSNorm"
    if site.tail:
        return f"goes on with {', '.join(site.tail)}"
    if site.owner == "module" and "forward" in vars(model.get_submodule(site.name)):
        return "its forward was replaced on the instance"
    return site.why_not


def _of_both(site: NormSite, eval_mode: Centerings, training: Centerings | None) -> Centering:
    centering = eval_mode.around(site.name)
    if training is None:
        return centering
    try:
        same = training.around(site.name)
    except Unsupported as reason:
        raise Unsupported(f"in training {reason}") from reason
    for output in same.outputs:  # of a dropout, say
        if output not in centering.outputs:
            raise Unsupported(f"in training no weight can center what {output.path} returns")
    if same != centering:
        raise Unsupported("is fed by other modules in training")
    return same


def _centering(site: NormSite, centering: Centering, trainable: bool) -> Iterable[Edit]:
    count = len(centering.norms)
    reason = f"feeds {count} LayerNorms" if count > 1 else "feeds a LayerNorm"
    gains: dict[tuple[str, str], None] = {}
    for each in centering.tensors:
        yield CenterTensor(
            site=site.name,
            path=each.path,
            reason=reason,
            tensor=each.tensor,
            axis=each.axis,
            gain=each.gain,
            fill=0 if each.vanishes else None,
            trainable=trainable,
        )
        if each.gain is not None:
            gains[each.gain] = None
    for path, tensor in gains:
        why = "is in the weight before"
        yield CenterTensor(site=site.name, path=path, reason=why, tensor=tensor, fill=1)
    for output in centering.outputs:
        why = f"{reason}, and no weight can center it"
        yield CenterOutput(site=site.name, path=output.path, reason=why, axis=output.axis)


def _without_mean(model: nn.Module, site: NormSite) -> ReplaceModule:
    held = formula(model.get_submodule(site.name))
    assert site.num_features is not None and held is not None
    return ReplaceModule(
        site=site.name,
        path=site.name,
        reason="its input has mean 0",
        aliases=site.paths,
        method="rms_norm",
        num_features=site.num_features,
        channel_axis=site.channel_axis,
        options={
            "eps": site.eps,
            "affine": held.gain is not None,
            "bias": held.bias is not None,
            "per_position": True,
        },
        tail=(),
    )
