"""How much of a shift each value carries: the linear equations of a propagation, solved."""

from collections.abc import Iterable, Mapping

from torch import Tensor, fx

from normswap.core.errors import Unsupported
from normswap.graph.operators.rule import Equation, Factor

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
