"""One propagation: all values of a captured model that change together, and what folds that in.

`solve` finds from the linear equations of a propagation how much of a shift each value carries.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from normswap.core.errors import Unsupported
from normswap.graph.capture import Region
from normswap.graph.operators import is_a, operator_of
from normswap.graph.operators.layout import NONE, equal, joined
from normswap.graph.operators.moving import Moving
from normswap.graph.operators.operator import MOVES, reads_numbers
from normswap.graph.operators.rule import (
    ChannelIndex,
    Constraints,
    Context,
    Equation,
    Factor,
    Folding,
    Rule,
    is_tensor,
    mutates,
    operands,
    passes,
    shape_of,
)
from normswap.graph.operators.rule import no_shift as no_shift_at
from normswap.graph.sites import Call, NormSite, describe

_ZERO = 1e-12


def solve(
    equations: Iterable[Equation], given: Mapping[fx.Node, float], *, offsets: bool = False
) -> dict[fx.Node, Factor]:
    """The multiplicities that obey all equations; those that are free are 0.

    Args:
        given: values whose multiplicity is known, and which no equation may change.
        offsets: solve for the offsets instead.

    Raises:
        Unsupported: no multiplicities obey them; the message is the reason of the first equation
            that contradicts those before it.
    """
    solved: dict[fx.Node, dict[fx.Node | None, Factor]] = {}  # value -> terms; None is the number 1
    for equation in equations:
        left: dict[fx.Node | None, Factor] = {None: equation.added} if offsets else {}
        for value, factor in equation.terms.items():
            if value in given:
                _add(left, {None: given[value]}, factor)
            else:
                _add(left, solved.get(value, {value: 1.0}), factor)
        pivot = next((v for v, each in left.items() if v is not None and _is_nonzero(each)), None)
        if pivot is None:
            if any(not _is_zero(factor) for factor in left.values()):
                raise Unsupported(equation.why)
            continue
        scale = left.pop(pivot)
        expressed = {value: -factor / scale for value, factor in left.items()}
        for value, terms in solved.items():
            if pivot in terms:
                factor = terms.pop(pivot)
                _add(solved[value], expressed, factor)
        solved[pivot] = expressed
    constants = {value: terms.get(None, 0.0) for value, terms in solved.items()}
    return {**constants, **given}


def _add(
    total: dict[fx.Node | None, Factor], terms: Mapping[fx.Node | None, Factor], factor: Factor
) -> None:
    for value, each in terms.items():
        total[value] = total.get(value, 0.0) + factor * each


def _is_zero(factor: Factor) -> bool:
    """Whether it is 0 for every channel."""
    return (
        bool((abs(factor) <= _ZERO).all()) if isinstance(factor, Tensor) else abs(factor) <= _ZERO
    )


def _is_nonzero(factor: Factor) -> bool:
    """Whether one can divide by it, for every channel."""
    return bool((abs(factor) > _ZERO).all()) if isinstance(factor, Tensor) else abs(factor) > _ZERO


class Stopped(Unsupported):
    """A change met an operator that none passes, wherever among the connected values it began.

    Attributes:
        channels: those that the value carried that met it.
    """

    def __init__(self, message: str, channels: Tensor) -> None:
        super().__init__(message)
        self.channels = channels


class Operators:
    """The operators of a captured model, a BatchNorm counting as one.

    Attributes:
        calls: the node that stands for a call of a BatchNorm (it computes the normalized value),
            and the site.
    """

    def __init__(self, sites: Iterable[NormSite]) -> None:
        self.calls: dict[fx.Node, tuple[NormSite, Call]] = {}
        self._inside: dict[fx.Node, fx.Node] = {}
        self._inputs: dict[fx.Node, list[fx.Node]] = {}
        for site in sites:
            if site.kind != "batch" and not site.has_fixed_affine:
                continue
            for call in site.executions:
                if call.region.symbolic:
                    continue
                stands, inside = call.output, call.nodes
                if site.tail:  # what ran in its children comes after the normalized value
                    own = (n for n in call.nodes if call.region.module_path(n) in site.paths)
                    inside = frozenset(own)
                    given = [n for n in inside if not inside.issuperset(n.users)]
                    stands = given[0] if len(given) == 1 else None
                if stands is not None:
                    self.calls[stands] = site, call
                    self._inside |= dict.fromkeys(inside, stands)
        self._outputs = {id(call): node for node, (_, call) in self.calls.items()}

    def around(self, value: fx.Node) -> Iterator[fx.Node]:
        """The operators that compute or take `value`."""
        yield self._inside.get(value, value)
        for user in value.users:
            if not reads_numbers(user, value):
                continue
            if is_a(user, "split"):
                yield from user.users
            else:
                yield self._inside.get(user, user)

    def output(self, call: Call) -> fx.Node | None:
        """The normalized value of a call, before its tail."""
        return self._outputs.get(id(call))

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """The values that `node` computes with; those of the call of which it takes one output."""
        if node not in self._inputs:
            call = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else node
            found = operands(node) or (operands(call) if is_a(call, "split") else [])
            self._inputs[node] = found
        return self._inputs[node]


@dataclass
class Propagation:
    """The change of one value, followed by the rules until it ends everywhere.

    Args:
        own: the operators that compute the affine now, or the value that it is given to; for each
            the value on the other side, where there is one.
        upstream: the values carry the affine already, instead of still lacking it.
        inverse: what folds it in may have to take it back.
        context: what the rules ask.
        moved: whether a site is folded, so that nothing is computed there any more.
        adjusts: whether a BatchNorm can fold in the affine of another.
        subtracts: whether an operator runs in a layer that can subtract the shift from its input
            before all else, so that no zero padding in it meets the shift.
    """

    operators: Operators
    own: Mapping[fx.Node, fx.Node | None]
    upstream: bool
    inverse: bool
    context: Context
    region: Callable[[fx.Node], Region]
    moved: Callable[[NormSite], bool]
    adjusts: Callable[[NormSite], bool]
    subtracts: Callable[[fx.Node], bool] = lambda _: False

    def propagate(self, known: dict[fx.Node, Tensor]) -> None:
        """Follow the change of the values in `known` to all that must change with them.

        Raises:
            Unsupported: an operator stops it, `Stopped` if it would stop any.
        """
        queue = list(known)
        while queue:
            value = queue.pop()
            for node in dict.fromkeys(self.operators.around(value)):
                if node in self.own:
                    continue
                forced = self._forced(node, value, known)
                if not forced and not self.inverse and (node is not value) == self.upstream:
                    raise Unsupported(self._not_alone(node, value))
                for other, layout in forced.items():
                    before = known.get(other)
                    if before is None and bool((layout == NONE).all()):
                        continue
                    if before is not None:
                        if torch.equal(before, layout):
                            continue
                        layout = joined(before, layout)
                        if equal(layout, before):
                            continue
                    known[other] = layout
                    queue.append(other)
        for node, source in self.own.items():
            if (node if self.upstream else source) in known:
                raise Unsupported("what comes before and what comes after it are computed together")

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
            raise Unsupported(f"{self._name(node)} writes into a value that others see")
        if isinstance(rule, Moving) and len(inputs := self.operators.inputs(node)) > 1:
            # What comes from the output goes to the inputs, and the other way round: a long
            # concatenation need not look at all of its inputs when one of them changes.
            near = [node] if node is value else inputs
            known = {each: known[each] for each in near if each in known}
        try:
            forced = dict(rule.propagate(node, known, self.context))
        except Unsupported as reason:
            raise Unsupported(f"{reason} ({self._name(node)})") from reason
        if not all(_fits(layout, other) for other, layout in forced.items()):
            raise Unsupported(f"its rule does not know such shapes ({self._name(node)})")
        return forced

    def _rule(self, node: fx.Node) -> Rule | None:
        """The rule of the operator of `node`; None for one that stops an affine."""
        row = operator_of(node)
        if row is None:
            return None
        return row.rule or (row.scale_rule if self.context.scale_alone else None)

    def solve(
        self,
        known: dict[fx.Node, Tensor],
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
        total = Constraints()
        nodes = dict.fromkeys(n for value in known for n in self.operators.around(value))
        for node in nodes:
            if node not in self.own:
                each = self._settled(node, known)
                total.equations += each.equations
                total.foldings += each.foldings
                total.positive += each.positive
        shifts: dict[fx.Node, Factor] = dict.fromkeys(known, 0.0)
        offsets: dict[fx.Node, Factor] = dict.fromkeys(known, 0.0)
        adds = any(equation.added for equation in total.equations)
        if not no_shift or adds:
            for folding in total.foldings:
                if not has_bias(folding):
                    why = f"{self._name(folding.node)} cannot be given a bias"
                    total.equations += no_shift_at(folding.value, why=why)
        if not no_shift:
            shifts |= solve(total.equations, dict.fromkeys(seeds, 1.0))
        if adds:
            offsets |= solve(total.equations, dict.fromkeys(seeds, 0.0), offsets=True)
        both = {value: (shifts[value], offsets[value]) for value in known}
        return total.foldings, both, total.positive

    def _settled(self, node: fx.Node, known: dict[fx.Node, Tensor]) -> Constraints:
        if node in self.operators.calls:
            return self._settled_call(node, known)
        if self._is_constant(node):
            layout = known[node]
            channel_index = ChannelIndex(tuple(layout.shape), tuple(layout.flatten().tolist()))
            return Constraints(foldings=[Folding(node, node, "out", node, None, channel_index)])
        try:
            rule = self._rule(node)
            assert rule is not None  # or spread would have stopped
            constraints = rule.constraints(node, known, self.context)
        except Unsupported as reason:
            raise Unsupported(f"{reason} ({self._name(node)})") from reason
        named = [
            replace(e, why=f"{e.why} ({self._name(node)})")
            for e in constraints.equations
            if len(e.terms) > 1 or not self.subtracts(node)
        ]
        return Constraints(named, constraints.foldings, constraints.positive)

    def _settled_call(self, node: fx.Node, known: dict[fx.Node, Tensor]) -> Constraints:
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
        here = self._name(value)
        if node is value:
            return Unsupported(
                f"{'its input comes' if self.upstream else 'a value comes'} from {here}"
            )
        other = self._name(node)
        if self.upstream:
            return Unsupported(f"{here} is also used by {other}")
        return Unsupported(f"its output goes to {other}")

    def _not_alone(self, node: fx.Node, value: fx.Node) -> str:
        """Why it cannot be without inverses: another operator takes or computes a changed value."""
        if self.upstream:
            return f"{self._name(value)} is also used by {self._name(node)}"
        return f"its output is joined by {self._name(value)}"

    def _name(self, node: fx.Node) -> str:
        if node in self.operators.calls:
            return self.operators.calls[node][0].name
        return describe(node, self.region(node))

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
