"""Replace recurrent networks by ones that normalize in every step.

Rules:
1. Every selected `nn.RNN`, `nn.LSTM` and `nn.GRU` becomes a network of the method at the same path,
   with the original's weights, dtype, device, flags and hooks; the norms start as in the paper.
2. One that is normalized already is left, and so is one that the method cannot be made from.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from normswap.core.errors import NormswapError
from normswap.norms.recurrent.network import NormalizedRecurrent
from normswap.norms.registry import check_options, method_named
from normswap.passes.edits import ReplaceRecurrentModule
from normswap.passes.plan import Plan, Skipped
from normswap.passes.selection import Globs, any_matches, listed


class ReplaceRecurrent:
    """Replace the selected recurrent networks by the method `to`.

    Args:
        to: the name of a method of kind "recurrent".
        include, exclude: globs on module paths; by default every recurrent network.
        options: the method's.

    Raises:
        NormswapError: an unknown method or option, or a method of another kind.
    """

    def __init__(
        self, to: str, *, include: Globs | None = None, exclude: Globs = (), **options: Any
    ) -> None:
        self.method = method_named(to)
        if self.method.kind != "recurrent":
            raise NormswapError(f"{to} does not take the place of a recurrent network; use Replace")
        check_options(self.method, options)
        self.include: Sequence[str] = ("*",) if include is None else listed(include)
        self.exclude, self.options = listed(exclude), options

    def __str__(self) -> str:
        return f"ReplaceRecurrent({self.method.name})"

    def plan(self, model: nn.Module, inputs: Any = None) -> Plan:
        """One edit for each selected network that can be replaced.

        Raises:
            NormswapError: a glob matches nothing, or there is nothing to replace.
        """
        networks = _recurrent(model)
        for glob in (*self.include, *self.exclude):
            if not any(any_matches(paths, glob) for paths in networks.values()):
                raise NormswapError(
                    f"{glob!r} matches none of the {len(networks)} recurrent networks of this "
                    f"model ({', '.join(paths[0] for paths in networks.values())})"
                )
        edits: list[ReplaceRecurrentModule] = []
        left: list[Skipped] = []
        for module, paths in networks.items():
            reason = self._why_not(module, paths)
            if reason:
                left.append(Skipped(site=paths[0], reason=reason))
                continue
            edits.append(
                ReplaceRecurrentModule(
                    site=paths[0],
                    path=paths[0],
                    aliases=tuple(paths),
                    reason=f"{module.num_layers} x {module.mode} of {module.hidden_size}",
                    method=self.method.name,
                    options=self.options,
                )
            )
        if not edits:
            why = "; ".join(f"{each.site or 'the model'}: {each.reason}" for each in left)
            raise NormswapError(f"nothing to replace: {why}")
        exact = self.method.keeps == "exact"
        return Plan(passes=(str(self),), edits=tuple(edits), left=tuple(left), exact=exact)

    def _why_not(self, module: nn.RNNBase, paths: Sequence[str]) -> str:
        """Why a network stays as it is; empty if it does not."""
        if any_matches(paths, self.exclude):
            return "excluded"
        if not any_matches(paths, self.include):
            return "not included"
        if "" in paths:
            return "is the whole model; put it into a module"
        if isinstance(module, NormalizedRecurrent):
            return "is normalized already"
        try:
            self.method.made(module, **self.options)
        except NormswapError as error:
            return str(error)
        return ""


def _recurrent(model: nn.Module) -> Mapping[nn.RNNBase, Sequence[str]]:
    """The recurrent networks of a model, each with all its paths.

    Raises:
        NormswapError: there is none.
    """
    found: dict[nn.RNNBase, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.RNNBase):
            found.setdefault(module, []).append(path)
    if not found:
        raise NormswapError("this model has no nn.RNN, nn.LSTM or nn.GRU to replace")
    return found
