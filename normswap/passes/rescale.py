"""Bring every activation into the range of a type, exactly: values are multiplied by powers of two.

A float16 holds nothing above 65,504, and where a runtime squares a value in it, for the variance of
a normalization, nothing above 255. A value beyond that becomes infinite, and what follows NaN.

Rules:
1. The values that must have one factor are a group (`graph.propagation.factor`); weights, and the
   eps of normalizations, take the factors in on both sides.
2. A group that reaches further than allowed is multiplied by the largest power of two that brings
   it into the range, with the margin. All others stay as they are.
3. A group with a value that cannot be scaled stays, with the reason: an input or output of the
   model, what a GELU or a softmax takes.

A power of two moves no digit of a float32, and eps' = s^2 eps makes a normalization of s x give the
digits that x gave. So the result is the same to the bit, as long as no weight leaves the range of
its type.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import floor, log2
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from normswap.core.errors import NormswapError, Unsupported
from normswap.graph.capture import Capture, capture
from normswap.graph.index import join
from normswap.graph.propagation.factor import Factors, Group
from normswap.graph.sites import describe, find_sites
from normswap.passes.edits import Edit, RescaleGroup
from normswap.passes.edits.rescaling import RescaledEps, RescaledTensor
from normswap.passes.plan import Plan, Skipped
from normswap.passes.selection import Globs, listed, matches

# By example, path of the captured part, and name of the node: the largest |value| on the data.
Ranges = Mapping[tuple[int, str, str], float]
Limit = Literal["float16", "square"]
_FLOAT16 = torch.finfo(torch.float16).max


class Rescale:
    """Bring activations into a range; see the module's docstring for the rules.

    Args:
        ranges: of the values of a capture on data (`normswap.fit.ranges`).
        limit: "float16": 65,504; "square": what a normalization takes stays below its root, so that
            its square is in the range; or a number of your own.
        margin: how many times further than the data an activation may reach.
        include, exclude: globs on the names of the modules that compute the largest value of a
            group; by default all.
        assume_example: the model is called in no other way than in the example.
    """

    def __init__(
        self,
        ranges: Ranges,
        *,
        limit: Limit | float = "float16",
        margin: float = 2.0,
        include: Globs | None = None,
        exclude: Globs = (),
        assume_example: bool = False,
    ) -> None:
        if isinstance(limit, str) and limit not in ("float16", "square"):
            raise NormswapError(
                f"no limit is called {limit!r}; take 'float16', 'square' or a number"
            )
        if not isinstance(limit, str) and not 0 < limit < float("inf"):
            raise NormswapError(f"the limit {limit} has to be a number above 0")
        if not 1 <= margin < float("inf"):
            raise NormswapError(f"the margin {margin} has to be 1 or more")
        self.ranges, self.limit, self.margin = ranges, limit, margin
        self.include, self.exclude = include, exclude
        self.assume_example = assume_example

    def __str__(self) -> str:
        return f"Rescale({self.limit})"

    def plan(self, model: nn.Module, inputs: Any = None) -> Plan:
        """The edits for each group that reaches too far.

        Raises:
            NormswapError: a glob matches no module.
        """
        for glob in (*listed(self.include), *listed(self.exclude)):
            if not any(matches(path, glob) for path, _ in model.named_modules()):
                raise NormswapError(
                    f"{glob!r} matches no module of the model; a plan of all (--dry-run) has the "
                    "names of those that reach too far"
                )
        seen = capture(model, inputs)
        factors = Factors(seen, find_sites(seen), assume_example=self.assume_example)
        scaled: list[_Scaled] = []
        left: list[Skipped] = []
        for group in factors.groups():
            reach, node = self._reach(seen, group)
            most = self._most(group)
            if reach * self.margin <= most:
                continue
            region = seen.index.region_of[node]
            name = region.module_path(node)
            where = f"{describe(node, region)} reaches {_number(reach)}"
            if self._is_left_out(name):
                left.append(Skipped(site=name, reason="excluded"))
                continue
            try:
                self._check(factors, group, reach)
                exponent = floor(log2(most / (self.margin * reach)))
                scaled.append(_Scaled(group, name, where, reach, exponent))
            except Unsupported as reason:
                left.append(Skipped(site=name, reason=f"{where}: {reason}"))
        scaled, too_large = _within_range(factors, scaled)
        edits: tuple[Edit, ...] = tuple(each.edit() for each in scaled)
        return Plan(passes=(str(self),), edits=edits, left=(*left, *too_large))

    def _reach(self, seen: Capture, group: Group) -> tuple[float, fx.Node]:
        """The largest |value| of a group on the data, and the value."""
        found = []
        for node in group.values:
            region = seen.index.region_of[node]
            found.append((self.ranges.get((region.example, region.path, node.name), 0.0), node))
        return max(found, key=lambda each: each[0])

    def _most(self, group: Group) -> float:
        if not isinstance(self.limit, str):
            return self.limit
        squares = self.limit == "square" and group.squared
        return float(_FLOAT16**0.5 if squares else _FLOAT16)

    def _is_left_out(self, name: str) -> bool:
        if matches(name, self.exclude):
            return True
        return self.include is not None and not matches(name, self.include)

    def _check(self, factors: Factors, group: Group, reach: float) -> None:
        """Raise Unsupported where `group` cannot be scaled."""
        if group.pinned is not None:
            raise Unsupported(group.pinned)
        if not reach < float("inf"):
            raise Unsupported("it is not finite in the type of the model; run it in float32")
        factors.check_seen(group)


@dataclass(frozen=True)
class _Scaled:
    """A group that is multiplied by 2^exponent.

    Attributes:
        name: of the module that computes its largest value.
        where: what that is, in words, and how far it reaches.
    """

    group: Group
    name: str
    where: str
    reach: float
    exponent: int

    def edit(self) -> RescaleGroup:
        """The edit that does it."""
        return RescaleGroup(
            site=self.name,
            path=self.name,
            reason=f"{self.where}, and {_number(self.reach * 2.0**self.exponent)} then",
            exponent=self.exponent,
            tensors=tuple(
                RescaledTensor(path=path, tensor=tensor, times=times)
                for (path, tensor), times in self.group.tensors.items()
                if times
            ),
            eps=tuple(RescaledEps(path=path, attribute=name) for path, name in self.group.eps),
        )


def _within_range(factors: Factors, scaled: list[_Scaled]) -> tuple[list[_Scaled], list[Skipped]]:
    """Those of `scaled` with which no weight leaves the range of float16, and the others.

    A weight that takes a group in and computes another one has both numbers.
    """
    left: list[Skipped] = []
    while True:
        takers: dict[tuple[str, str], list[tuple[int, _Scaled]]] = {}
        for each in scaled:
            for tensor, times in each.group.tensors.items():
                takers.setdefault(tensor, []).append((times * each.exponent, each))
        found = None
        for (path, name), shifts in takers.items():
            reach = _reach_of(factors.tensor(path, name)) * 2.0 ** sum(each for each, _ in shifts)
            if reach > _FLOAT16 and max(shifts, key=lambda each: each[0])[0] > 0:
                found = max(shifts, key=lambda each: each[0])[1]
                reason = f"{found.where}: {join(path, name)} would reach {_number(reach)} then"
                left.append(Skipped(site=found.name, reason=reason))
                break
        if found is None:
            return scaled, left
        scaled = [each for each in scaled if each is not found]


def _reach_of(tensor: Tensor | None) -> float:
    if tensor is None or tensor.is_meta or not tensor.numel():
        return 0.0
    return float(tensor.detach().abs().max())


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
