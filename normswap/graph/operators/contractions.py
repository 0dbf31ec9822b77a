"""Sums of products over axes: matmul, mm, bmm, einsum.

Every axis of an operand and of the output has a letter, as in einsum: matmul is ik,kj->ij. Where
the channels lie along letters that one operand shares with the output, a scale passes between the
two; a constant that has these letters folds it in instead. A shift passes where the products are
with weights that add up to 1 over the one letter that is summed over, as a softmax gives them.
"""

from typing import Any

import torch
from torch import Tensor, fx

from normswap.core.errors import Unsupported
from normswap.graph.operators.layout import equal
from normswap.graph.operators.moving import order_of
from normswap.graph.operators.operator import define, is_a, sources_of
from normswap.graph.operators.pointwise import is_same
from normswap.graph.operators.rule import (
    ChannelIndex,
    Constraints,
    Context,
    Folding,
    Layouts,
    argument,
    has_argument,
    no_shift,
    passes,
    shape_of,
)
from normswap.graph.operators.weights import transposed_by

aten = torch.ops.aten


class Contraction:
    """out = the sum over all letters that it lacks of the product of the operands."""

    def propagate(self, node: fx.Node, known: Layouts, context: Context) -> Layouts:
        letters, forced = _letters(node), dict[fx.Node, Tensor]()
        for value in letters:
            if value in known and _matrix(node, letters, value, known[value], context) is None:
                partner = _partner(node, letters, value, known[value])
                forced[partner] = _moved(known[value], letters[value], partner, letters[partner])
        return forced

    def constraints(self, node: fx.Node, known: Layouts, context: Context) -> Constraints:
        letters, constraints, passed = _letters(node), Constraints(), dict[fx.Node, None]()
        for value in letters:
            if value not in known:
                continue
            matrix = _matrix(node, letters, value, known[value], context)
            if matrix is None:
                partner = _partner(node, letters, value, known[value])
                moved = _moved(known[value], letters[value], partner, letters[partner])
                if partner not in known or not equal(moved, known[partner]):
                    raise Unsupported("only a part of it can be followed")
                passed |= {value: None, partner: None}
                continue
            constraints.foldings.append(_folding(node, letters, value, matrix, known[value]))
            why = "its shift meets a product without bias"
            constraints.equations += no_shift(value, why=why)
        if not passed:
            return constraints
        if len(passed) > 2 or node in [each.value for each in constraints.foldings]:
            raise Unsupported("two factors of a product carry the affine")
        if _adds_up_to_one(letters, node, passed, context):
            constraints.equations += passes(*passed)
        else:
            why = "its shift meets a product without softmax"
            constraints.equations += no_shift(*passed, why=why)
        return constraints


def _letters(node: fx.Node) -> dict[fx.Node, str]:
    """The letter of each axis of the output, then of the operands."""
    if has_argument(node, "equation"):
        operands: list[Any] = list(argument(node, "tensors"))
        equation = str(argument(node, "equation")).replace(" ", "")
    else:
        operands = list(node.args[:2])
        ranks = [len(shape_of(operand)) for operand in operands]
        batch = "abcdefgh"[: max(*ranks, 2) - 2]
        left = (batch + "ik")[-ranks[0] :] if ranks[0] > 1 else "k"
        right = (batch + "kj")[-ranks[1] :] if ranks[1] > 1 else "k"
        out = batch + "i" * (ranks[0] > 1) + "j" * (ranks[1] > 1)
        equation = f"{left},{right}->{out}"
    taken, arrow, out = equation.partition("->")
    if not arrow:
        out = "..." * ("." in taken)
        out += "".join(x for x in sorted(set(taken) - set(",.")) if taken.count(x) == 1)
    more, each = 0, []
    for operand, names in zip(operands, taken.split(","), strict=True):
        count = len(shape_of(operand)) - len(names.replace("...", ""))
        each.append(names.replace("...", _MORE[len(_MORE) - count :]))
        more = max(more, count)
    out = out.replace("...", _MORE[len(_MORE) - more :])
    if len({node, *operands}) <= len(operands) or any(len(set(s)) < len(s) for s in (*each, out)):
        raise Unsupported("a product of a value with itself lies between them")
    return {node: out, **dict(zip(operands, each, strict=True))}


_MORE = "αβγδεζηθ"  # for what einsum calls "..."


def _varying(layout: Tensor, letters: str) -> set[str]:
    return {letter for letter, size in zip(letters, layout.shape, strict=True) if size > 1}


def _has(letters: dict[fx.Node, str], value: fx.Node, layout: Tensor, other: fx.Node) -> bool:
    """Whether `other` has all axes that the layout of `value` varies along, in full size."""
    sizes = dict(zip(letters[other], shape_of(other), strict=True))
    own = dict(zip(letters[value], layout.shape, strict=True))
    return all(sizes.get(letter) == own[letter] for letter in _varying(layout, letters[value]))


def _matrix(
    node: fx.Node, letters: dict[fx.Node, str], value: fx.Node, layout: Tensor, context: Context
) -> fx.Node | None:
    """The constant operand that folds in what `value` carries."""
    return next(
        (
            operand
            for operand in reversed(list(letters))
            if operand not in (node, value)
            and _has(letters, value, layout, operand)
            and _constant(operand, context)
        ),
        None,
    )


def _constant(operand: fx.Node, context: Context) -> bool:
    if context.constant(operand) is not None:
        return True
    inputs = operand.all_input_nodes
    if len(inputs) != 1 or context.constant(inputs[0]) is None:
        return False
    return transposed_by(operand) is not operand


def _partner(node: fx.Node, letters: dict[fx.Node, str], value: fx.Node, layout: Tensor) -> fx.Node:
    """The value at the other end of the operator that carries the same."""
    found = [
        other
        for other in letters
        if other is not value and node in (value, other) and _has(letters, value, layout, other)
    ]
    if not found:
        raise Unsupported("a product along its channels lies between them")
    return found[-1]


def _moved(layout: Tensor, letters: str, partner: fx.Node, wanted: str) -> Tensor:
    """The layout along the axes of another value."""
    own = [letter for letter in letters if letter in wanted]
    shape = [layout.shape[letters.index(letter)] for letter in own]
    moved = layout.reshape(shape).permute([own.index(each) for each in wanted if each in own])
    sizes = iter(moved.shape)
    return moved.reshape([next(sizes) if letter in own else 1 for letter in wanted])


def _folding(
    node: fx.Node, letters: dict[fx.Node, str], value: fx.Node, operand: fx.Node, layout: Tensor
) -> Folding:
    matrix, names = transposed_by(operand), letters[operand]
    channel_index = _moved(layout, letters[value], operand, names)
    transpose = None if matrix is operand else operand
    if transpose is not None:
        channel_index = channel_index.t()
    side = "out" if value is node else "in"
    channels = tuple(channel_index.flatten().tolist())
    plain = channels == tuple(range(len(channels)))
    placed = ChannelIndex(tuple(channel_index.shape), None if plain else channels)
    return Folding(node, value, side, matrix, None, placed, None, False, transpose)  # type: ignore[arg-type]


def _adds_up_to_one(
    letters: dict[fx.Node, str], node: fx.Node, passed: dict[fx.Node, None], context: Context
) -> bool:
    """Whether the only other operand adds up to 1 over the only letter that is summed over."""
    others = [operand for operand in letters if operand is not node and operand not in passed]
    summed = set("".join(letters.values())) - set(letters[node])
    if len(others) != 1 or len(summed) != 1:
        return False
    (weights,), (over,) = others, summed
    return over in letters[weights] and is_softmax(weights, letters[weights].index(over), context)


def is_softmax(weights: fx.Node, axis: int, context: Context) -> bool:
    """Whether the elements of `weights` add up to 1 along `axis`."""
    rank = len(shape_of(weights))
    while not is_a(weights, "softmax"):
        if is_a(weights, "permute"):
            axis = order_of(weights)[axis]
        elif not is_same(weights, training=context.training):
            return False
        (weights,) = sources_of(weights)
    return int(argument(weights, "dim")) % rank == axis


define("matmul", aten.matmul.default, aten.mm.default, rule=Contraction())
define("contraction", aten.bmm.default, aten.einsum.default, rule=Contraction())
