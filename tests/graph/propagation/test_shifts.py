"""The multiplicities of a shift obey the equations of the rules, or there are none that do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from normswap.core.errors import Unsupported
from normswap.graph.operators.rule import Equation
from normswap.graph.propagation.engine import solve

VALUES = [fx.Graph().placeholder(f"v{index}") for index in range(5)]
FACTORS = [-2.0, -1.0, 0.0, 0.5, 1.0]


@st.composite
def systems(draw: st.DrawFn) -> tuple[list[Equation], dict[fx.Node, float]]:
    """Equations of few terms, as operators give them, and values that are given."""
    rows = st.lists(st.sampled_from(FACTORS), min_size=5, max_size=5)
    drawn = draw(st.lists(rows, max_size=6))
    equations = [
        Equation({v: f for v, f in zip(VALUES, row, strict=True) if f}, f"why {index}")
        for index, row in enumerate(drawn)
    ]
    given = draw(st.dictionaries(st.sampled_from(VALUES), st.just(1.0), min_size=1, max_size=2))
    return equations, given


def _residual(equations: list[Equation], given: dict[fx.Node, float]) -> float:
    """The smallest residual that any multiplicities leave, by torch's own least squares."""
    free = [value for value in VALUES if value not in given]
    matrix = torch.zeros(len(equations), len(free), dtype=torch.float64)
    right = torch.zeros(len(equations), dtype=torch.float64)
    for index, equation in enumerate(equations):
        for value, factor in equation.terms.items():
            if value in given:
                right[index] -= factor * given[value]
            else:
                matrix[index, free.index(value)] += factor
    best = torch.linalg.pinv(matrix) @ right
    return float((matrix @ best - right).abs().max())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(systems())
def test_it_finds_multiplicities_exactly_where_there_are_some(
    system: tuple[list[Equation], dict[fx.Node, float]],
) -> None:
    equations, given_values = system
    possible = not equations or _residual(equations, given_values) < 1e-9
    if not possible:
        with pytest.raises(Unsupported):
            solve(equations, given_values)
        return
    found = solve(equations, given_values)
    assert all(found[value] == number for value, number in given_values.items())
    for equation in equations:
        total = sum(factor * found.get(value, 0.0) for value, factor in equation.terms.items())
        assert abs(total) < 1e-9


def test_the_reason_is_that_of_the_equation_that_contradicts_those_before() -> None:
    a, b, c = VALUES[:3]
    equations = [
        Equation({a: 1.0, b: -1.0}, "moves"),
        Equation({b: 1.0, c: -1.0}, "moves on"),
        Equation({c: 1.0}, "meets a zero padding"),
    ]
    with pytest.raises(Unsupported, match=r"^meets a zero padding$"):
        solve(equations, {a: 1.0})


def test_the_shift_of_a_sum_may_come_through_either_operand() -> None:
    total, a, b = VALUES[:3]
    found = solve(
        [Equation({total: 1.0, a: -1.0, b: -1.0}, "sum"), Equation({a: 1.0}, "no bias")],
        {total: 1.0},
    )
    assert found == {total: 1.0, a: 0.0, b: 1.0}
