"""What travels: the affine y = scale * x + shift of a normalization, per channel.

`ScaleShift` has its numbers, where a rule depends on them, `Conditions` what was decided by these,
and `AffinePropagation` follows the affine through a captured model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256

import torch
from torch import Tensor, fx, nn

from normswap.core.errors import Unsupported
from normswap.graph.index import Index
from normswap.graph.norm_modules import formula
from normswap.graph.operators import is_a, operator_of
from normswap.graph.operators.layout import NONE
from normswap.graph.operators.moving import Moving
from normswap.graph.operators.operator import MOVES
from normswap.graph.operators.rule import (
    ChannelIndex,
    Constraints,
    Context,
    Factor,
    Folding,
    Rule,
    is_tensor,
    mutates,
    passes,
    shape_of,
)
from normswap.graph.operators.rule import (
    no_shift as no_shift_at,
)
from normswap.graph.propagation.engine import Operators, Propagation, solve
from normswap.graph.sites import NormSite

# Taking y = gamma n + beta back to n subtracts beta, whose rounding error beside n is then
# beta / gamma times as large.
_LARGEST_SHIFT = 8.0
_TINY = torch.finfo(torch.float64).tiny
Multiple = float | tuple[float, ...]  # one number, or one for each channel


@dataclass(frozen=True)
class ScaleShift:
    """The affine y = scale * x + shift of a BatchNorm with fixed statistics.

    Attributes:
        scale, shift: (C,), float64.
        invertible: taking it back does not amplify rounding errors much.
        cancels: how many times as large as its result are the numbers that cancel in s x + t.
    """

    scale: Tensor
    shift: Tensor
    invertible: bool
    cancels: float = 0.0

    def with_another(
        self,
        other: "ScaleShift",
        channels: Tensor,
        *,
        before: bool,
        inverse: bool,
        times: Multiple,
        offset: Multiple = 0.0,
    ) -> "ScaleShift":
        """This affine and `other` in one.

        Args:
            channels: (C,), for each channel the one of `other`, -1 for none.
            before: `other` comes first.
            inverse: `other` is taken back.
            times: how often its shift comes in.
            offset: how often its scale less 1 comes in as well.
        """
        m, n = (torch.as_tensor(each, dtype=torch.float64) for each in (times, offset))
        scale, shift = other.scale, other.shift * m + (other.scale - 1) * n
        if inverse:
            scale, shift = 1 / scale, -shift / scale
        scale = torch.cat([scale, scale.new_ones(1)])[channels]
        shift = torch.cat([shift, shift.new_zeros(1)])[channels]
        shift = self.scale * shift + self.shift if before else scale * self.shift + shift
        scale = scale * self.scale
        cancels = max(self.cancels, 1.0) * max(other.cancels, 1.0)
        return ScaleShift(scale, shift, self.invertible and other.invertible, cancels)


@dataclass(frozen=True)
class Conditions:
    """What has to hold of an affine's numbers, because a plan was decided by them.

    Attributes:
        positive: the channels whose scale is above 0; a maximum commutes with no other.
        no_shift: every shift is 0, as it has no place to go.
        same_shift: sets of channels with one shift each, which a normalization does not see; -1
            stands for a value without the affine, whose shift is 0.
        invertible: taking the affine back does not amplify rounding errors much.
        constants: parameters and buffers of the model, by name, whose numbers were used, each with
            the digest of these.
    """

    positive: tuple[int, ...] = ()
    no_shift: bool = False
    same_shift: tuple[tuple[int, ...], ...] = ()
    invertible: bool = False
    constants: tuple[tuple[str, str], ...] = ()

    def broken_by(self, numbers: ScaleShift) -> str | None:
        """Which of these does not hold for `numbers`; None if all do."""
        if self.positive and not bool((numbers.scale[list(self.positive)] > 0).all()):
            return "its scale is not positive any more, and a maximum lies behind it"
        if self.no_shift and bool(numbers.shift.any()):
            return "it has a shift now, which has no place to go"
        padded = torch.cat([numbers.shift, numbers.shift.new_zeros(1)])
        if any((padded[list(each)] != padded[each[0]]).any() for each in self.same_shift):
            return "its shifts differ now, and the normalization behind it would see that"
        if self.invertible and not numbers.invertible:
            return "taking its affine back would amplify rounding errors now"
        return None


def digest_of(tensor: Tensor) -> str:
    """What tells the numbers of a tensor from others."""
    return sha256(tensor.detach().double().cpu().contiguous().numpy().tobytes()).hexdigest()


def numbers_of(norm: nn.Module) -> ScaleShift | None:
    """The affine of `norm` in eval mode; None where its formula is not BatchNorm's, or on meta."""
    found = None if hasattr(norm, "eval_affine") else formula(norm)
    if found is None or found.variance is None:
        return None
    with torch.no_grad():
        variance = _float64(norm, found.variance, 1.0)
        if variance.is_meta:
            return None
        mean, bias = (_float64(norm, name, 0.0, variance) for name in (found.mean, found.bias))
        gain = _float64(norm, found.gain, 1.0 - found.gain_offset, variance) + found.gain_offset
        scale = gain * torch.rsqrt(variance + found.eps)
        cancels = (mean * scale).abs() / (gain.abs() + bias.abs()).clamp(min=_TINY)
        well = (bias.abs() <= _LARGEST_SHIFT * gain.abs()) & (scale != 0) & scale.isfinite()
        return ScaleShift(scale, bias - mean * scale, bool(well.all()), float(cancels.max()))


def _float64(
    norm: nn.Module, name: str | None, default: float, like: Tensor | None = None
) -> Tensor:
    """The tensor `name` of `norm`, (C,); without one as many of the default as `like` has."""
    if name is None:
        assert like is not None
        return torch.full_like(like, default)
    tensor: Tensor = getattr(norm, name)
    return tensor.double().flatten()


class Stopped(Unsupported):
    """A change met an operator that none passes, wherever among the connected values it began.

    Attributes:
        channels: those that the value carried that met it.
    """

    def __init__(self, message: str, channels: Tensor) -> None:
        super().__init__(message)
        self.channels = channels


class AffinePropagation(Propagation):
    """The affine of a normalization, y = s x + t per channel, on its way into weights.

    Args:
        own: the operators that compute the affine now, or the value that it is given to; for each
            the value on the other side, where there is one.
        upstream: the values carry the affine already, instead of still lacking it.
        inverse: what folds it in may have to take it back.
        moved: whether a site is folded, so that nothing is computed there any more.
        adjusts: whether a BatchNorm can fold in the affine of another.
        subtracts: whether an operator runs in a layer that can subtract the shift from its input
            before all else, so that no zero padding in it meets the shift.
    """

    def __init__(
        self,
        operators: Operators,
        index: Index,
        context: Context,
        own: Mapping[fx.Node, fx.Node | None],
        *,
        upstream: bool,
        inverse: bool,
        moved: Callable[[NormSite], bool],
        adjusts: Callable[[NormSite], bool],
        subtracts: Callable[[fx.Node], bool] = lambda _: False,
    ) -> None:
        super().__init__(operators, index, context)
        self.own, self.upstream, self.inverse = own, upstream, inverse
        self.moved, self.adjusts, self.subtracts = moved, adjusts, subtracts

    def propagate(self, seeds: Mapping[fx.Node, Tensor]) -> None:
        super().propagate(seeds)
        for node, source in self.own.items():
            if (node if self.upstream else source) in self.known:
                raise Unsupported("what comes before and what comes after it are computed together")

    def forced(self, node: fx.Node, value: fx.Node) -> Mapping[fx.Node, Tensor]:
        if node in self.own:
            return {}
        forced = self._forced(node, value, self.known)
        if not forced and not self.inverse and (node is not value) == self.upstream:
            raise Unsupported(self._not_alone(node, value))
        return forced

    def _forced(
        self, node: fx.Node, value: fx.Node, known: dict[fx.Node, Tensor]
    ) -> dict[fx.Node, Tensor]:
        if node in self.operators.calls:
            site, call = self.operators.calls[node]
            if value is not node and value is not call.input:  # one of its own tensors
                raise self._stopped(node, value)
            if self.moved(site) and call.input is not None:
                layout = known[node] if node in known else known[call.input]
                return {node: layout, call.input: layout}
            if self.adjusts(site):
                return {}
            raise self._stopped(node, value)
        if self._is_constant(node):
            return {}
        rule = self._rule(node)
        written = mutates(node)
        if rule is None or (node is value and not self.operators.inputs(node)):
            layout = known[value]
            raise Stopped(str(self._stopped(node, value)), torch.unique(layout[layout != NONE]))
        if written is not None and (len(written.users) > 1 or self._is_held(written)):
            raise Unsupported(f"{self.name_of(node)} writes into a value that others see")
        if isinstance(rule, Moving) and len(inputs := self.operators.inputs(node)) > 1:
            # What comes from the output goes to the inputs, and the other way round: a long
            # concatenation need not look at all of its inputs when one of them changes.
            near = [node] if node is value else inputs
            known = {each: known[each] for each in near if each in known}
        try:
            forced = dict(rule.propagate(node, known, self.context))
        except Unsupported as reason:
            raise Unsupported(f"{reason} ({self.name_of(node)})") from reason
        if not all(_fits(layout, other) for other, layout in forced.items()):
            raise Unsupported(f"its rule does not know such shapes ({self.name_of(node)})")
        return forced

    def _rule(self, node: fx.Node) -> Rule | None:
        """The rule of the operator of `node`; None for one that stops an affine."""
        row = operator_of(node)
        if row is None:
            return None
        return row.rule or (row.scale_rule if self.context.scale_alone else None)

    def solve(
        self,
        seeds: frozenset[fx.Node],
        *,
        no_shift: bool,
        has_bias: Callable[[Folding], bool],
    ) -> tuple[list[Folding], dict[fx.Node, tuple[Factor, Factor]], list[Tensor]]:
        """What folds in the change, the multiplicity of the shift and the offset of each value, and
        the layouts whose scales must be positive.

        Args:
            seeds: where the change begins.
            no_shift: the affine has none.
            has_bias: whether a shift can be added where a change is folded.

        Raises:
            Unsupported: the shift cannot be placed, or an operator holds only a part of it.
        """
        total, known = Constraints(), self.known
        nodes = dict.fromkeys(n for value in known for n in self.operators.around(value))
        for node in nodes:
            if node not in self.own:
                each = self._constrained(node, known)
                total.equations += each.equations
                total.foldings += each.foldings
                total.positive += each.positive
        shifts: dict[fx.Node, Factor] = dict.fromkeys(known, 0.0)
        offsets: dict[fx.Node, Factor] = dict.fromkeys(known, 0.0)
        adds = any(equation.added for equation in total.equations)
        if not no_shift or adds:
            for folding in total.foldings:
                if not has_bias(folding):
                    why = f"{self.name_of(folding.node)} cannot be given a bias"
                    total.equations += no_shift_at(folding.value, why=why)
        if not no_shift:
            shifts |= solve(total.equations, dict.fromkeys(seeds, 1.0))
        if adds:
            offsets |= solve(total.equations, dict.fromkeys(seeds, 0.0), offsets=True)
        both = {value: (shifts[value], offsets[value]) for value in known}
        return total.foldings, both, total.positive

    def _constrained(self, node: fx.Node, known: dict[fx.Node, Tensor]) -> Constraints:
        if node in self.operators.calls:
            return self._constrained_call(node, known)
        if self._is_constant(node):
            layout = known[node]
            channel_index = ChannelIndex(tuple(layout.shape), tuple(layout.flatten().tolist()))
            return Constraints(foldings=[Folding(node, node, "out", node, None, channel_index)])
        try:
            rule = self._rule(node)
            assert rule is not None  # or it would have stopped
            constraints = rule.constraints(node, known, self.context)
        except Unsupported as reason:
            raise Unsupported(f"{reason} ({self.name_of(node)})") from reason
        named = [
            replace(e, why=f"{e.why} ({self.name_of(node)})")
            for e in constraints.equations
            if len(e.terms) > 1 or not self.subtracts(node)
        ]
        return Constraints(named, constraints.foldings, constraints.positive)

    def _constrained_call(self, node: fx.Node, known: dict[fx.Node, Tensor]) -> Constraints:
        site, call = self.operators.calls[node]
        assert call.input is not None
        if self.moved(site):
            return Constraints(passes(node, call.input))
        constraints = Constraints()
        for value, side in ((node, "out"), (call.input, "in")):
            if value in known:
                layout = known[value]
                if layout.numel() != layout.shape[site.channel_axis]:
                    raise Unsupported(f"{site.name} normalizes another axis")
                channels = layout.flatten().expand(site.num_features or 0)
                channel_index = ChannelIndex((len(channels),), tuple(channels.tolist()))
                constraints.foldings.append(
                    Folding(node, value, side, node, None, channel_index, channel_index)  # type: ignore[arg-type]
                )
        return constraints

    # --- words ------------------------------------------------------------------------------------

    def _stopped(self, node: fx.Node, value: fx.Node) -> Unsupported:
        here = self.name_of(value)
        if node is value:
            return Unsupported(
                f"{'its input comes' if self.upstream else 'a value comes'} from {here}"
            )
        other = self.name_of(node)
        if self.upstream:
            return Unsupported(f"{here} is also used by {other}")
        return Unsupported(f"its output goes to {other}")

    def _not_alone(self, node: fx.Node, value: fx.Node) -> str:
        """Why it cannot be without inverses: another operator takes or computes a changed value."""
        if self.upstream:
            return f"{self.name_of(value)} is also used by {self.name_of(node)}"
        return f"its output is joined by {self.name_of(value)}"

    def name_of(self, node: fx.Node) -> str:
        if node in self.operators.calls:
            return self.operators.calls[node][0].name
        return super().name_of(node)

    def _is_constant(self, node: fx.Node) -> bool:
        return is_tensor(node) and self.context.constant(node) is not None

    def _is_held(self, value: fx.Node) -> bool:
        """Whether more than the operators that take it see it: it is a view, or a parameter."""
        return value.op == "placeholder" or is_a(value, *MOVES, "pick")


def _fits(layout: Tensor, value: fx.Node) -> bool:
    shape = shape_of(value)
    return layout.dim() == len(shape) and all(
        size in (1, own) for size, own in zip(layout.shape, shape, strict=True)
    )
