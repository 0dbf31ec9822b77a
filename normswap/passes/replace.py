"""Replace normalizations by another method.

Rules:
1. Every selected site becomes a module of the method at the same path, on the same axis, with the
   original's eps, gain and bias, dtype, device, flags and hooks; what a subclass does after
   normalizing (timm's BatchNormAct2d) is kept.
2. A functional batch norm gets a module first (`normswap.passes.modularize`); other calls are left.
3. A method that takes over running statistics (batch, frozen, sync) needs a site that has them, or
   data on which they are measured afterwards: then a GroupNorm, LayerNorm or RMSNorm becomes a
   BatchNorm, with a gain and a bias to fit.
4. A statistic over a single value would erase its input, so it is refused (x - mean(x) = 0).

`replacement` chooses the pass that puts a method into a model, by the kind of the method.
"""

import math
from collections.abc import Callable, Mapping
from copy import copy
from inspect import signature
from typing import Any

from torch import nn

from normswap.core.errors import NormswapError, Unsupported
from normswap.graph.capture import capture
from normswap.graph.index import own_tensors
from normswap.graph.norm_modules import formula
from normswap.graph.propagation.owners import Owners
from normswap.graph.sites import NormSite, find_sites
from normswap.norms.batch.frozen import check_statistics
from normswap.norms.registry import check_options, method_named, own_names
from normswap.norms.sample.group import at_most, resolve_groups, sensible_groups
from normswap.passes.edits import ReplaceModule
from normswap.passes.folding import is_folded
from normswap.passes.modularize import modularized_first
from normswap.passes.plan import Plan, Skipped
from normswap.passes.recurrent import ReplaceRecurrent
from normswap.passes.reweight import Reweight
from normswap.passes.selection import Globs, select

# Whose statistics, of the sample, can become those of data.
_MEASURED = ("layer", "rms", "group", "instance", "batch")


class Replace:
    """Replace the selected normalizations by the method `to`.

    Args:
        to: the name of a method (`normswap.methods()`).
        include, exclude: globs on site names; by default every BatchNorm.
        groups: for group_norm: how many, for every site or for each (site name -> groups); a
            function of the number of channels; or "at most 32", the largest number up to that which
            divides the channels. None or "auto" leaves the choice to the data where there are some
            (`leaves_groups_open`).
        options: the method's others.
    """

    def __init__(
        self,
        to: str,
        *,
        include: Globs | None = None,
        exclude: Globs = (),
        groups: int | Mapping[str, int] | Callable[[int], int] | str | None = None,
        **options: Any,
    ) -> None:
        self.method = method_named(to)
        if "num_groups" in options:
            options = own_names(options if groups is None else {"groups": groups, **options})
            groups = options.pop("groups")
        self._groups_of: Callable[[int], int] | None = None
        if isinstance(groups, str) and groups != "auto":
            groups = at_most(groups)
        if callable(groups):
            self._groups_of, groups = groups, None
            check_options(self.method, {"groups": None})
        if "channel_axis" in options:
            raise NormswapError("the channels stay on the axis on which they are; leave it out")
        if groups == "auto":
            check_options(self.method, {"groups": None})  # for no other method is there a choice
        elif groups is not None:
            options["groups"] = groups
        by_site = groups if isinstance(groups, Mapping) else {}
        check_options(self.method, {name: v for name, v in options.items() if v is not by_site})
        for number in by_site.values():
            check_options(self.method, {"groups": number})
        self.include, self.exclude, self.options = include, exclude, options
        self.estimates = False
        self._errors: Mapping[str, Mapping[int, float]] = {}

    def estimating(self) -> "Replace":
        """The same replacement; data will give the running statistics that a site has not."""
        other = copy(self)
        other.estimates = True
        return other

    def __str__(self) -> str:
        return f"Replace({self.method.name})"

    @property
    def leaves_groups_open(self) -> bool:
        """Whether the number of groups is still to be chosen."""
        decided = {"groups", "channels_per_group"}.intersection(self.options)
        return "groups" in self.method.options and not decided and self._groups_of is None

    def group_candidates(self, model: nn.Module, inputs: Any = None) -> dict[str, list[int]]:
        """The sensible numbers of groups of every site that will be replaced."""
        sites = {site.name: site for site in find_sites(capture(model, inputs))}
        changed = [edit for edit in self.plan(model, inputs).edits if edit.edit == "replace"]
        return {
            edit.site: sensible_groups(edit.num_features, sites[edit.site].spatial)
            for edit in changed
        }

    def with_groups(self, errors: Mapping[str, Mapping[int, float]]) -> "Replace":
        """The same replacement; each site has the number of groups of which the error is least.

        Args:
            errors: for each site the squared error by the number of groups
                (`normswap.fit.groups`), which the plan tells; the first where they are NaN.
        """
        other = Replace(
            self.method.name,
            include=self.include,
            exclude=self.exclude,
            groups={site: min(each, key=each.__getitem__) for site, each in errors.items()},
            **self.options,
        )
        other.estimates, other._errors = self.estimates, errors
        return other

    def plan(self, model: nn.Module, inputs: Any = None) -> Plan:
        """One edit for each selected site that can be replaced.

        Raises:
            NormswapError: nothing is selected, an option does not fit a site, or a site would be
                erased.
        """
        seen = capture(model, inputs)
        selected, others = select(find_sites(seen), self.include, self.exclude)
        owners = Owners(seen)
        whole, as_calls = modularized_first(self, seen, selected, inputs, "all", other_kinds=True)
        if whole is not None:
            return whole
        edits: list[ReplaceModule] = []
        left = [Skipped(site=site.name, reason=reason) for site, reason in others] + as_calls
        for site in (site for site in selected if site.owner == "module"):
            try:
                edit = self._edit(model, site)
                _check_read_in_calls(model, owners, site)
                edits.append(edit)
            except Unsupported as reason:
                left.append(Skipped(site=site.name, reason=str(reason)))
        # With other options than its own a method may compute something else, and with statistics
        # that are still to be measured it does.
        measured = any(not self._has_statistics(site) for site in selected)
        exact = self.method.keeps == "exact" and not self.options and not measured
        return Plan(passes=(str(self),), edits=tuple(edits), left=tuple(left), exact=exact)

    def _edit(self, model: nn.Module, site: NormSite) -> ReplaceModule:
        if site.why_not is not None:
            raise Unsupported(site.why_not)
        if site.num_features is None:
            raise Unsupported("its number of channels is unknown")
        module = model.get_submodule(site.name)
        if is_folded(model, site):
            raise Unsupported("is computed by a weight (tune mode); unfreeze it first")
        if self.method.needs_running and not self._has_statistics(site):
            if not self.estimates:
                raise Unsupported(
                    "has no running statistics to take over; give data to measure them on"
                )
            if site.kind not in _MEASURED:
                raise Unsupported(f"is {site.kind} normalization, which no statistics are fixed of")
        elif self.method.needs_running:
            if self.method.name == "frozen_batch_norm" and site.statistics == "frozen":
                raise Unsupported("is frozen already")
            check_statistics(module, site.name)
        options = self._options(module, site)
        self._refuse_to_erase(module, site, options)
        edit = ReplaceModule(
            site=site.name,
            path=site.name,
            aliases=site.paths,
            reason=f"{site.cls}({site.num_features}){self._compared(site.name)}",
            method=self.method.name,
            num_features=site.num_features,
            channel_axis=site.channel_axis,
            options=options,
            tail=site.tail,
        )
        edit.build()  # what the method objects to is better known now
        return edit

    def _compared(self, site: str) -> str:
        """What each number of groups gives, where the data chose one of several."""
        errors = self._errors.get(site, {})
        if len(errors) < 2 or any(map(math.isnan, errors.values())):
            return ""
        numbers = ", ".join(map(str, errors))
        shares = ", ".join(f"{100 * each:.2g}" for each in errors.values())
        return f"; squared error with {numbers} groups: {shares} % of its variance"

    @staticmethod
    def _has_statistics(site: NormSite) -> bool:
        """Whether a site has running statistics, as a BatchNorm has them."""
        return site.statistics in ("running", "frozen") and site.kind == "batch"

    def _options(self, module: nn.Module, site: NormSite) -> dict[str, Any]:
        """The method's options with nothing left open, so that the plan rebuilds without inputs."""
        assert site.num_features is not None
        carried = {"eps": site.eps, "affine": site.affine}
        if site.kind == "local_response":
            del carried["eps"]  # its k is no variance's eps
        taken = signature(self.method.build).parameters
        options: dict[str, Any] = {name: v for name, v in carried.items() if name in taken}
        options |= {**self.method.swap, **self.options}
        if self.method.needs_running and not self._has_statistics(site):
            options |= {"affine": True} if "affine" in taken else {}
        if "groups" in self.method.options:
            groups = options.pop("groups", None)
            if isinstance(groups, Mapping):
                if site.name not in groups:
                    raise NormswapError(f"groups gives no number for {site.name}; add it")
                groups = groups[site.name]
            if self._groups_of is not None:
                groups = self._groups_of(site.num_features)
            per_group = options.pop("channels_per_group", None)
            options["groups"] = resolve_groups(site.num_features, site.spatial, groups, per_group)
        if "per_position" in self.method.options:
            # Where the channels lie last, as in a transformer, the LayerNorm replaced was per
            # position, and so is what comes in its place.
            options.setdefault("per_position", site.channel_axis == -1)
        if "bias" in self.method.options:
            found = formula(module)
            options.setdefault("bias", found is not None and found.bias is not None)
        if "momentum" in self.method.options:
            options.setdefault("momentum", getattr(module, "momentum", 0.1))
        return options

    def _refuse_to_erase(
        self, module: nn.Module, site: NormSite, options: Mapping[str, Any]
    ) -> None:
        if self.method.values is None or site.num_features is None:
            return
        if site.spatial is None:
            one = self.method.values(site.num_features, 1, options) < 2
            if one and isinstance(module, nn.BatchNorm1d):
                raise NormswapError(
                    f"{self.method.name} at {site.name} would normalize over a single value if its "
                    "input is (N, C); give example inputs, exclude it, or choose fewer groups"
                )
        elif self.method.values(site.num_features, site.spatial, options) < 2:
            raise NormswapError(
                f"{self.method.name} at {site.name} would normalize over a single value and erase "
                f"its input, of shape {_shape(site)}; exclude it, or choose fewer groups"
            )


def _check_read_in_calls(model: nn.Module, owners: Owners, site: NormSite) -> None:
    """What reads the tensors of a normalization, instead of calling it, would not see another.

    Raises:
        Unsupported: something does.
    """
    if any(call.region.symbolic for call in site.executions):
        return  # whose nodes are whole modules
    names = [name for name, _ in own_tensors(model.get_submodule(site.name))]
    inside = {node for call in site.executions for node in call.nodes}
    owners.check_reads(site.name, names, inside)


def _shape(site: NormSite) -> str:
    return "x".join(map(str, site.input_shape or ()))


Replacement = Replace | Reweight | ReplaceRecurrent


def replacement(to: str, **options: Any) -> Replacement:
    """The pass for `convert(model, to)`; the arguments are those of the pass.

    Raises:
        NormswapError: an unknown method or option, or one that takes the place of nothing.
    """
    method = method_named(to)
    if method.folds_scale:
        return Reweight(to, **options)
    if method.kind == "recurrent":
        return ReplaceRecurrent(to, **options)
    if method.kind == "activation":
        return Replace(to, **options)
    remedy = (
        "use parametrize"
        if method.kind == "weight"
        else f"put create({to!r}, channels) before the model"
    )
    raise NormswapError(f"{to} takes the place of no normalization; {remedy}")
