"""Operators that act on each element alone: dropout in eval, casts, add, sub, mul, div, neg."""

import operator
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from normswap.core.errors import Unsupported
from normswap.graph.operators.layout import NONE, equal, joined, of_operand
from normswap.graph.operators.operator import define, rule_of
from normswap.graph.operators.rule import (
    ChannelIndex,
    Constraints,
    Context,
    Equation,
    Factor,
    Folding,
    Layouts,
    argument,
    has_argument,
    is_tensor,
    no_shift,
    operands,
    passes,
    shape_of,
)

aten = torch.ops.aten


class Same:
    """The output is the input, under a condition.

    Args:
        why_not: what stands against it, for a node in eval (False) or training mode; None if
            nothing does.
    """

    def __init__(self, why_not: Callable[[fx.Node, bool], str | None] = lambda *_: None) -> None:
        self.why_not = why_not

    def propagate(self, node: fx.Node, known: Layouts, context: Context) -> Layouts:
        source = operands(node)[0]
        layouts = [known[value] for value in (source, node) if value in known]
        return dict.fromkeys((source, node), layouts[0]) if layouts else {}

    def constraints(self, node: fx.Node, known: Layouts, context: Context) -> Constraints:
        if (why_not := self.why_not(node, context.training)) is not None:
            raise Unsupported(f"{why_not} lies between them")
        return Constraints(passes(node, operands(node)[0]))


def is_same(node: fx.Node, *, training: bool = False) -> bool:
    """Whether an operator returns what it is given."""
    rule = rule_of(node)
    return type(rule) is Same and rule.why_not(node, training) is None


def _is_active(node: fx.Node, training: bool) -> str | None:
    # Dropout zeroes values, and an affine of zero is not zero: only its eval mode commutes.
    active = argument(node, "p") and (training or argument(node, "train"))
    return "dropout, which does not commute where it is active," if active else None


def _detaches(_: fx.Node, training: bool) -> str | None:
    return "detach" if training else None  # gradients of gamma and beta would no longer arrive


def is_cast(node: fx.Node) -> bool:
    """Whether an operator returns what it is given in another floating-point type."""
    rule = rule_of(node)
    casts = type(rule) is Same and rule.why_not is _casts
    return casts and is_tensor(node) and _casts(node, False) is not None


def _casts(node: fx.Node, _: bool) -> str | None:
    dtype = node.meta["val"].dtype
    same = node.all_input_nodes[0].meta["val"].dtype == dtype
    return None if same else f"a cast to {dtype}"


class Sum:
    """out = a + k b, a - b, -a: every operand carries the scale, and the shifts add up.

    Args:
        signs: of the operands.
        scaled: the one that `alpha` multiplies, by its position.
    """

    def __init__(self, *signs: float, scaled: int = 1) -> None:
        self._signs, self._scaled = signs, scaled

    def terms(self, node: fx.Node) -> list[tuple[Any, float]]:
        """The operands in order, numbers too, and what each is multiplied by."""
        alpha = float(argument(node, "alpha")) if has_argument(node, "alpha") else 1.0
        return [
            (node.args[position], sign * (alpha if position == self._scaled else 1.0))
            for position, sign in enumerate(self._signs)
        ]

    def propagate(self, node: fx.Node, known: Layouts, context: Context) -> Layouts:
        layout = None
        for value in (node, *operands(node)):
            if value in known:
                aligned = _aligned(known[value], node)
                layout = aligned if layout is None else joined(layout, aligned)
        assert layout is not None
        forced = {
            source: of_operand(layout, shape_of(source))
            for source in operands(node)
            if one_number(source, layout, known, context) is None
        }
        return {**forced, node: layout}

    def constraints(self, node: fx.Node, known: Layouts, context: Context) -> Constraints:
        terms: dict[fx.Node, Factor] = {node: 1.0}
        added = 0.0
        for value, factor in self.terms(node):
            if not isinstance(value, fx.Node):
                if value * factor and not context.literal(node):
                    raise Unsupported("a number that may depend on the size is added between them")
                added += value * factor
                continue
            number = one_number(value, known[node], known, context) if is_tensor(value) else None
            if number is not None:
                added += number * factor
                continue
            if not is_tensor(value):  # it carries no affine, as little as a number does
                raise Unsupported("a tensor of integers is added between them")
            terms[value] = terms.get(value, 0.0) - factor
        if added and bool((known[node] == NONE).any()):
            raise Unsupported("a number is added to what is normalized in part")
        return Constraints([Equation(terms, "its shift would be added twice", added)])


class Product:
    """out = a b, a / b: the scale passes through one factor; a constant factor folds it in.

    A shift passes by a number alone, k (s x + t) = s (k x) + k t, which no other input may change,
    or by one number for each channel.

    Args:
        divides: it is a quotient.
    """

    def __init__(self, *, divides: bool = False) -> None:
        self.divides = divides

    def numerators(self, node: fx.Node) -> list[fx.Node]:
        """The factors that are tensors; no divisor."""
        if not self.divides:
            return operands(node)
        return operands(node)[:1] if isinstance(node.args[0], fx.Node) else []

    def number(self, node: fx.Node) -> float | None:
        """The number that a tensor is multiplied with, where there is one."""
        numbers = [value for value in node.args[:2] if isinstance(value, (int, float))]
        if not numbers or (self.divides and not numbers[0]):
            return None
        return 1.0 / numbers[0] if self.divides else float(numbers[0])

    def constant(self, node: fx.Node, context: Context) -> fx.Node | None:
        """The factor that is a constant, which can fold in a scale; no divisor.

        A parameter rather than a buffer, which may be a mask.
        """
        if len(operands(node)) != 2:
            return None
        constants = [f for f in self.numerators(node) if context.constant(f) is not None]
        trained = [f for f in constants if isinstance(context.constant(f), nn.Parameter)]
        return next(iter([*trained, *constants]), None)

    def propagate(self, node: fx.Node, known: Layouts, context: Context) -> Layouts:
        factors, passing = operands(node), self._passing(node, known, context)
        if passing is not None:
            source, _ = passing
            layout = known[source] if source in known else known[node]
            return {source: layout, node: layout}
        if self.constant(node, context) is not None:
            return {}
        changed = [factor for factor in factors if factor in known]
        if len(changed) > 1 or (
            changed and factors[0] is factors[-1] and self.number(node) is None
        ):
            raise Unsupported("both of its factors carry the affine")
        if changed:
            layout = _aligned(known[changed[0]], node)
            return {node: layout} if node not in known else {node: joined(known[node], layout)}
        whole = [f for f in self.numerators(node) if shape_of(f) == shape_of(node)]
        if not whole:
            raise Unsupported("a factor that is broadcast lies between them")
        return {whole[0]: known[node]}

    def constraints(self, node: fx.Node, known: Layouts, context: Context) -> Constraints:
        passing = self._passing(node, known, context)
        if passing is not None:
            return _passed(node, *passing, known, context)
        constant = self.constant(node, context)
        if constant is not None:
            if context.numbers(constant) is not None:
                context.stopping.append(node)
            return _folded(node, constant, known)
        changed = [factor for factor in operands(node) if factor in known]
        if len(changed) != 1 or changed[0] not in self.numerators(node):
            raise Unsupported("it divides by a value that carries the affine")
        if not equal(_aligned(known[changed[0]], node), known[node]):
            raise Unsupported("only a part of it can be followed")
        number = self.number(node)
        if number is None:
            return Constraints(no_shift(node, changed[0], why="its shift would be multiplied"))
        if not context.literal(node):
            why = "its shift meets a number that may depend on the size"
            return Constraints(no_shift(node, changed[0], why=why))
        return Constraints([Equation({node: 1.0, changed[0]: -number}, "its shift is scaled")])

    def _passing(
        self, node: fx.Node, known: Layouts, context: Context
    ) -> tuple[fx.Node, Tensor] | None:
        """The factor that passes an affine by a constant, and what it is multiplied by."""
        if len(operands(node)) != 2 or operands(node)[0] is operands(node)[1]:
            return None
        for constant, source in (operands(node), operands(node)[::-1]):
            if constant in known or source not in self.numerators(node):
                continue
            if shape_of(source) != shape_of(node) or context.constant(source) is not None:
                continue
            layout = known[source] if source in known else known.get(node)
            numbers = context.numbers(constant)
            if numbers is None or layout is None:
                continue
            if constant not in self.numerators(node):
                return source, 1 / numbers
            if context.through or (numbers.numel() == 1 and layout.numel() > 1):
                return source, numbers
        return None


def one_number(operand: fx.Node, layout: Tensor, known: Layouts, context: Context) -> float | None:
    """The number that a constant is, where it is the same one for several channels."""
    if prod(shape_of(operand)) != 1 or layout.numel() == 1 or operand in known:
        return None
    numbers = context.numbers(operand)
    return None if numbers is None else float(numbers)


def _passed(
    node: fx.Node, source: fx.Node, factor: Tensor, known: Layouts, context: Context
) -> Constraints:
    if source not in known or node not in known or not equal(known[source], known[node]):
        raise Unsupported("only a part of it can be followed")
    each = _per_channel(_aligned(factor, node), known[node], context.channels)
    if each is None:
        return Constraints(no_shift(node, source, why="its shift would be multiplied"))
    return Constraints([Equation({node: 1.0, source: -each}, "its shift is scaled")])


def _per_channel(factor: Tensor, layout: Tensor, channels: int) -> Factor | None:
    """The factor of each channel; None where there is no one such, or none to divide by."""
    if factor.numel() == 1:
        return float(factor) if _DIVISIBLE < abs(float(factor)) < 1 / _DIVISIBLE else None
    shape = [max(sizes) for sizes in zip(factor.shape, layout.shape, strict=True)]
    factor, layout = factor.expand(shape).flatten(), layout.expand(shape).flatten()
    factor, layout = factor[layout != NONE], layout[layout != NONE]
    each = torch.ones(channels, dtype=torch.float64)
    each[layout] = factor
    if not torch.equal(each[layout], factor):
        return None
    sizes = each.abs()
    return each if bool(((sizes > _DIVISIBLE) & (sizes < 1 / _DIVISIBLE)).all()) else None


_DIVISIBLE = 1e-6  # a shift that is divided by less would be too large for its type


def _folded(node: fx.Node, constant: fx.Node, known: Layouts) -> Constraints:
    constraints = Constraints()
    for value in (node, *operands(node)):
        if value in known and value is not constant:
            layout = of_operand(_aligned(known[value], node), shape_of(constant))
            channel_index = ChannelIndex(tuple(layout.shape), tuple(layout.flatten().tolist()))
            side = "out" if value is node else "in"
            constraints.foldings.append(
                Folding(node, value, side, constant, None, channel_index, gives_bias=False)  # type: ignore[arg-type]
            )
            constraints.equations += no_shift(value, why="its shift would be multiplied")
    return constraints


def _aligned(layout: Tensor, node: fx.Node) -> Tensor:
    """The layout of an operand, seen from the output it is broadcast to."""
    return layout.view(*[1] * (len(shape_of(node)) - layout.dim()), *layout.shape)


define("same", aten.clone.default, aten.lift_fresh_copy.default, rule=Same())
define("same", aten.alias.default, aten.contiguous.default, rule=Same(), may_alias=True)
define("same", aten.detach.default, aten.detach_.default, rule=Same(_detaches))
define(
    "same",
    aten.dropout.default,
    aten.dropout_.default,
    aten.feature_dropout.default,
    aten.feature_dropout_.default,
    aten.alpha_dropout.default,
    aten.alpha_dropout_.default,
    aten.feature_alpha_dropout.default,
    aten.feature_alpha_dropout_.default,
    rule=Same(_is_active),
    may_alias=True,
)
define(
    "same",
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    rule=Same(_casts),
    may_alias=True,
)
define("same", aten.type_as.default, rule=Same(_casts), looks_at="other", may_alias=True)
define("same", aten._to_copy.default, rule=Same(_casts))
define(
    "sum",
    *(aten.add.Tensor, aten.add_.Tensor, aten.add.Scalar),
    *("add", "add_", operator.add, operator.iadd, torch.add),
    name="add",
    rule=Sum(1.0, 1.0),
)
define(
    "sum",
    *(aten.sub.Tensor, aten.sub_.Tensor, aten.sub.Scalar),
    *("sub", "sub_", operator.sub, operator.isub, torch.sub),
    name="sub",
    rule=Sum(1.0, -1.0),
)
define(
    "sum",
    *(aten.rsub.Tensor, aten.rsub.Scalar, torch.rsub),
    name="sub",
    rule=Sum(-1.0, 1.0, scaled=0),
)
define(
    "sum",
    *(aten.neg.default, aten.neg_.default),
    *("neg", "neg_", operator.neg, torch.neg),
    name="neg",
    rule=Sum(-1.0),
)
define(
    "product",
    *(aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar),
    *("mul", "mul_", operator.mul, operator.imul, torch.mul),
    name="mul",
    rule=Product(),
)
define(
    "product",
    *(aten.div.Tensor, aten.div_.Tensor, aten.div.Scalar),
    *("div", "div_", operator.truediv, operator.itruediv, torch.div),
    name="div",
    rule=Product(divides=True),
)
