"""How much of a shift each value carries: the linear equations of a movement, solved."""

from collections.abc import Iterable, Mapping

from torch import fx

from normswap.graph.affine.rules.rule import Equation
from normswap.graph.norm_modules import Unsupported

_ZERO = 1e-12


def solve(equations: Iterable[Equation], given: Mapping[fx.Node, float]) -> dict[fx.Node, float]:
    """The multiplicities that obey all equations; those that are free are 0.

    Args:
        given: values whose multiplicity is known, and which no equation may change.

    Raises:
        Unsupported: no multiplicities obey them; the message is the reason of the first equation
            that contradicts those before it.
    """
    solved: dict[fx.Node, dict[fx.Node | None, float]] = {}  # value -> terms; None is the number 1
    for equation in equations:
        left: dict[fx.Node | None, float] = {}
        for value, factor in equation.terms.items():
            if value in given:
                _add(left, {None: given[value]}, factor)
            else:
                _add(left, solved.get(value, {value: 1.0}), factor)
        pivot = next(
            (v for v, factor in left.items() if v is not None and abs(factor) > _ZERO), None
        )
        if pivot is None:
            if abs(left.get(None, 0.0)) > _ZERO:
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
    total: dict[fx.Node | None, float], terms: Mapping[fx.Node | None, float], factor: float
) -> None:
    for value, each in terms.items():
        total[value] = total.get(value, 0.0) + factor * each
