"""Operators that act on each element alone: dropout in eval, casts, add, sub, mul, div, neg."""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from normswap.graph.affine.layout import NONE, equal, joined, of_operand
from normswap.graph.affine.rules.rule import (
    Absorbing,
    Context,
    Equation,
    Factor,
    Layouts,
    Settled,
    Slots,
    argument,
    has_argument,
    is_tensor,
    no_shift,
    operands,
    passes,
    shape_of,
)
from normswap.graph.norm_modules import Unsupported

aten = torch.ops.aten


class Same:
    """The output is the input, under a condition."""

    def __init__(self, condition: Callable[[fx.Node, Context], None] | None = None) -> None:
        self._condition = condition

    def spread(self, node: fx.Node, known: Layouts, context: Context) -> Layouts:
        source = operands(node)[0]
        layout = known[source] if source in known else known[node]
        return {source: layout, node: layout}

    def settle(self, node: fx.Node, known: Layouts, context: Context) -> Settled:
        if self._condition is not None:
            self._condition(node, context)
        return Settled(passes(node, operands(node)[0]))


class Homogeneous(Same):
    """f(s x) = s f(x) where s is positive: the scale passes, and no shift does."""

    def settle(self, node: fx.Node, known: Layouts, context: Context) -> Settled:
        source = operands(node)[0]
        if source not in known or node not in known or not equal(known[source], known[node]):
            raise Unsupported("only a part of it can be followed")
        why = "its shift meets a function that is not linear"
        return Settled(no_shift(source, node, why=why), positive=[known[node]])


def _in_eval(node: fx.Node, context: Context) -> None:
    # Dropout zeroes values, and an affine of zero is not zero: only its eval mode commutes.
    if argument(node, "p") and (context.training or argument(node, "train")):
        raise Unsupported("dropout lies between them, which does not commute where it is active")


def _not_in_training(node: fx.Node, context: Context) -> None:
    if context.training:  # gradients of gamma and beta would no longer arrive
        raise Unsupported("detach lies between them")


def _same_dtype(node: fx.Node, context: Context) -> None:
    if operands(node)[0].meta["val"].dtype != node.meta["val"].dtype:
        raise Unsupported(f"a cast to {node.meta['val'].dtype} lies between them")


class Sum:
    """out = a + k b, a - b, k a: every operand carries the scale, and the shifts add up."""

    def spread(self, node: fx.Node, known: Layouts, context: Context) -> Layouts:
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

    def settle(self, node: fx.Node, known: Layouts, context: Context) -> Settled:
        terms: dict[fx.Node, Factor] = {node: 1.0}
        added = 0.0
        for value, factor in _terms(node):
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
        return Settled([Equation(terms, "its shift would be added twice", added)])


def _terms(node: fx.Node) -> list[tuple[Any, float]]:
    if node.target in (aten.neg.default, aten.neg_.default):
        return [(node.args[0], -1.0)]
    alpha = float(argument(node, "alpha")) if has_argument(node, "alpha") else 1.0
    if node.target in (aten.rsub.Scalar, aten.rsub.Tensor):
        return [(node.args[1], 1.0), (node.args[0], -alpha)]
    sign = -1.0 if "sub" in str(node.target) else 1.0
    return [(node.args[0], 1.0), (node.args[1], sign * alpha)]


class Product:
    """out = a b, a / b: the scale passes through one factor; a constant factor absorbs it.

    A shift passes by a number alone, k (s x + t) = s (k x) + k t, which no other input may change,
    or by one number for each channel.
    """

    def spread(self, node: fx.Node, known: Layouts, context: Context) -> Layouts:
        factors, passing = operands(node), _passing(node, known, context)
        if passing is not None:
            source, _ = passing
            layout = known[source] if source in known else known[node]
            return {source: layout, node: layout}
        if constant_factor(node, context) is not None:
            return {}
        changed = [factor for factor in factors if factor in known]
        if len(changed) > 1 or (changed and factors[0] is factors[-1] and _other(node) is None):
            raise Unsupported("both of its factors carry the affine")
        if changed:
            layout = _aligned(known[changed[0]], node)
            return {node: layout} if node not in known else {node: joined(known[node], layout)}
        whole = [f for f in numerators(node) if shape_of(f) == shape_of(node)]
        if not whole:
            raise Unsupported("a factor that is broadcast lies between them")
        return {whole[0]: known[node]}

    def settle(self, node: fx.Node, known: Layouts, context: Context) -> Settled:
        passing = _passing(node, known, context)
        if passing is not None:
            return _passed(node, *passing, known, context)
        constant = constant_factor(node, context)
        if constant is not None:
            if context.numbers(constant) is not None:
                context.stopping.append(node)
            return _absorbed(node, constant, known)
        changed = [factor for factor in operands(node) if factor in known]
        if len(changed) != 1 or changed[0] not in numerators(node):
            raise Unsupported("it divides by a value that carries the affine")
        if not equal(_aligned(known[changed[0]], node), known[node]):
            raise Unsupported("only a part of it can be followed")
        number = _other(node)
        if number is None:
            return Settled(no_shift(node, changed[0], why="its shift would be multiplied"))
        if not context.literal(node):
            why = "its shift meets a number that may depend on the size"
            return Settled(no_shift(node, changed[0], why=why))
        return Settled([Equation({node: 1.0, changed[0]: -number}, "its shift is scaled")])


def _other(node: fx.Node) -> float | None:
    """The number that the operator multiplies with, where it is one."""
    numbers = [value for value in node.args[:2] if isinstance(value, (int, float))]
    if not numbers:
        return None
    divides = "div" in str(node.target)
    return 1.0 / numbers[0] if divides and numbers[0] else float(numbers[0])


def numerators(node: fx.Node) -> list[fx.Node]:
    divides = "div" in str(node.target)
    if divides and isinstance(node.args[0], (int, float)):
        return []
    return operands(node)[:1] if divides else operands(node)


def constant_factor(node: fx.Node, context: Context) -> fx.Node | None:
    """The factor that is a constant, which can absorb a scale; no divisor.

    A parameter rather than a buffer, which may be a mask.
    """
    if len(operands(node)) != 2:
        return None
    constants = [f for f in numerators(node) if context.constant(f) is not None]
    trained = [f for f in constants if isinstance(context.constant(f), nn.Parameter)]
    return next(iter([*trained, *constants]), None)


def one_number(operand: fx.Node, layout: Tensor, known: Layouts, context: Context) -> float | None:
    """The number that a constant is, where it is the same one for several channels."""
    if prod(shape_of(operand)) != 1 or layout.numel() == 1 or operand in known:
        return None
    numbers = context.numbers(operand)
    return None if numbers is None else float(numbers)


def _passing(node: fx.Node, known: Layouts, context: Context) -> tuple[fx.Node, Tensor] | None:
    """The factor that passes an affine by a constant, and what it is multiplied by."""
    if len(operands(node)) != 2 or operands(node)[0] is operands(node)[1]:
        return None
    for constant, source in (operands(node), operands(node)[::-1]):
        if constant in known or source not in numerators(node):
            continue
        if shape_of(source) != shape_of(node) or context.constant(source) is not None:
            continue
        layout = known[source] if source in known else known.get(node)
        numbers = context.numbers(constant)
        if numbers is None or layout is None:
            continue
        if constant not in numerators(node):
            return source, 1 / numbers
        if context.through or (numbers.numel() == 1 and layout.numel() > 1):
            return source, numbers
    return None


def _passed(
    node: fx.Node, source: fx.Node, factor: Tensor, known: Layouts, context: Context
) -> Settled:
    if source not in known or node not in known or not equal(known[source], known[node]):
        raise Unsupported("only a part of it can be followed")
    each = _per_channel(_aligned(factor, node), known[node], context.channels)
    if each is None:
        return Settled(no_shift(node, source, why="its shift would be multiplied"))
    return Settled([Equation({node: 1.0, source: -each}, "its shift is scaled")])


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


def _absorbed(node: fx.Node, constant: fx.Node, known: Layouts) -> Settled:
    settled = Settled()
    for value in (node, *operands(node)):
        if value in known and value is not constant:
            layout = of_operand(_aligned(known[value], node), shape_of(constant))
            slots = Slots(tuple(layout.shape), tuple(layout.flatten().tolist()))
            side = "out" if value is node else "in"
            settled.absorbing.append(
                Absorbing(node, value, side, constant, None, slots, gives_bias=False)  # type: ignore[arg-type]
            )
            settled.equations += no_shift(value, why="its shift would be multiplied")
    return settled


def _aligned(layout: Tensor, node: fx.Node) -> Tensor:
    """The layout of an operand, seen from the output it is broadcast to."""
    return layout.view(*[1] * (len(shape_of(node)) - layout.dim()), *layout.shape)


SAME: dict[Any, Same] = {
    aten.clone.default: Same(),
    aten.contiguous.default: Same(),
    aten.lift_fresh_copy.default: Same(),
    aten.detach.default: Same(_not_in_training),
    aten.detach_.default: Same(_not_in_training),
    **dict.fromkeys(
        (
            aten.dropout.default,
            aten.dropout_.default,
            aten.feature_dropout.default,
            aten.feature_dropout_.default,
            aten.alpha_dropout.default,
            aten.alpha_dropout_.default,
            aten.feature_alpha_dropout.default,
            aten.feature_alpha_dropout_.default,
        ),
        Same(_in_eval),
    ),
    **dict.fromkeys(
        (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default),
        Same(_same_dtype),
    ),
}
SUMS = (
    aten.add.Tensor,
    aten.add_.Tensor,
    aten.add.Scalar,
    aten.sub.Tensor,
    aten.sub_.Tensor,
    aten.sub.Scalar,
    aten.rsub.Tensor,
    aten.rsub.Scalar,
    aten.neg.default,
    aten.neg_.default,
)
PRODUCTS = (
    aten.mul.Tensor,
    aten.mul_.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.div_.Tensor,
    aten.div.Scalar,
)
# Only for a scale that moves alone: where a shift moves with it, they stop both.
HOMOGENEOUS: dict[Any, Homogeneous] = dict.fromkeys(
    (
        aten.relu.default,
        aten.relu_.default,
        aten.leaky_relu.default,
        aten.leaky_relu_.default,
        aten.prelu.default,
        aten.abs.default,
        aten.abs_.default,
    ),
    Homogeneous(),
)
