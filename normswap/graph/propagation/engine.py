"""The engine: it follows a change through a captured model, and solves for what comes with it.

A `Propagation` spreads the layouts of the values that change together; each thing that travels is a
subclass, in a file of its own. `solve` finds from linear equations how much of a shift, say, each
value carries.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from normswap.core.errors import Unsupported
from normswap.graph.index import Index
from normswap.graph.operators import is_a
from normswap.graph.operators.layout import NONE, equal, joined
from normswap.graph.operators.operator import reads_numbers
from normswap.graph.operators.rule import Context, Equation, Factor, operands
from normswap.graph.sites import Call, NormSite, describe

_ZERO = 1e-12


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


@dataclass(eq=False)
class Propagation(ABC):
    """A change of some values of a captured model, followed until it ends everywhere.

    What travels is a map on the channels of a value. The layout of a value (see
    `graph.operators.layout`) says which channel each element is, and so how the map acts on it. A
    subclass is one kind of map: it says what an operator does with that.

    Args:
        operators: those of the model.
        index: of the model.
        context: what the rules ask.

    Attributes:
        known: the layout of each value that changes.
    """

    operators: Operators
    index: Index
    context: Context
    known: dict[fx.Node, Tensor] = field(init=False, default_factory=dict)

    @abstractmethod
    def forced(self, node: fx.Node, value: fx.Node) -> Mapping[fx.Node, Tensor]:
        """The values that change with `value` as the operator `node` computes or takes it.

        Returns:
            Their layouts; nothing where the change ends at `node`.

        Raises:
            Unsupported: the operator stops it.
        """

    def propagate(self, seeds: Mapping[fx.Node, Tensor]) -> None:
        """Follow the change from `seeds`, values with their layouts, to all that go with them.

        Raises:
            Unsupported: an operator stops it.
        """
        self.known |= seeds
        queue = list(seeds)
        while queue:
            value = queue.pop()
            for node in dict.fromkeys(self.operators.around(value)):
                for other, layout in self.forced(node, value).items():
                    before = self.known.get(other)
                    if before is None and bool((layout == NONE).all()):
                        continue
                    if before is not None:
                        if torch.equal(before, layout):
                            continue
                        layout = joined(before, layout)
                        if equal(layout, before):
                            continue
                    self.known[other] = layout
                    queue.append(other)

    def name_of(self, node: fx.Node) -> str:
        """A node as a person would name it."""
        return describe(node, self.index.region_of[node])


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
