"""The table of operators: one row for each, which says all that normswap knows of it.

A row is `define`d beside the rule that it names, in the file of its kind. A table is looked into by
what a node calls (`operator_of`): an ATen operator in a captured graph, or the function or method
of torch, or of Python, by which a forward writes the same one.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from normswap.core.compat import OpOverload
from normswap.graph.operators.rule import Rule

aten = torch.ops.aten

OperatorKind = Literal[
    # It moves elements: all, in order; all, by axes; any; into one of several outputs.
    "reshape",
    "permute",
    "move",
    "split",
    # It puts inputs side by side; it puts elements around its input.
    "concatenate",
    "stack",
    "pad",
    # It returns its input, under a condition; it adds; it multiplies; it is a function.
    "same",
    "sum",
    "product",
    "function",
    "softmax",
    "log softmax",
    # It works over other axes than the channels'; it picks rows; it adds rows up.
    "window",
    "pick",
    "scatter",
    # It has a weight, or multiplies matrices.
    "convolution",
    "transposed convolution",
    "linear",
    "addmm",
    "matmul",
    "grouped matmul",
    "contraction",
    "embedding",
    "attention",
    "normalization",
    # Its rule comes from outside, and that is all that is known of it.
    "registered",
    # It looks at the shape, dtype or device of a value alone; it makes a tensor like that.
    "look",
    "fill",
]
MOVES: tuple[OperatorKind, ...] = (
    "reshape",
    "permute",
    "move",
    "concatenate",
    "stack",
    "pad",
)  # with one output
ARITHMETIC: tuple[OperatorKind, ...] = (
    "sum",
    "product",
    "pad",
)  # what a forward may write in several ways
WEIGHTED: tuple[OperatorKind, ...] = (
    "convolution",
    "transposed convolution",
    "linear",
    "addmm",
    "matmul",
    "grouped matmul",
)


@dataclass(frozen=True)
class Operator:
    """One row of the table.

    Attributes:
        name: as torch calls it, whatever the overload: "add" for aten.add_.Tensor and `+`.
        kind: what it does with its input.
        rule: how a scale and a shift of each channel go through it, or into it; None stops them.
        scale_rule: how a scale does that comes without a shift, where a shift would stop both.
        may_alias: it may return its input itself, or a view of it, though its schema says neither.
        looks_at: the argument of which it takes the shape or the dtype alone.
        along: its argument `dim` names the one axis that it works along; it keeps the others.
        floating: torch has it for floating-point numbers alone.
        fills: the number that all elements of its output have.
        normalizes: the kind of normalization that it is.
        unit_interval: it gives each element a value between 0 and 1.
    """

    name: str
    kind: OperatorKind
    rule: Rule | None = None
    scale_rule: Rule | None = None
    may_alias: bool = False
    looks_at: str | None = None
    along: bool = False
    floating: bool = False
    fills: float | None = None
    normalizes: str | None = None
    unit_interval: bool = False


TABLE: dict[Any, Operator] = {}


def define(kind: OperatorKind, *targets: Any, name: str | None = None, **facts: Any) -> None:
    """Add a row for what is called as each of `targets`.

    Args:
        targets: overloads of ATen operators, functions, the names of tensors' methods, and those of
            operators that other packages define.
        name: that of the row; each target's own where it is not given.
        facts: the other attributes of `Operator`.
    """
    for target in targets:
        assert target not in TABLE, f"{target} has a row"
        TABLE[target] = Operator(name or name_of(target), kind, **facts)


def operator_of(node: fx.Node) -> Operator | None:
    """The row of what `node` calls; None for one that the table does not have."""
    row = TABLE.get(node.target)
    if row is None and isinstance(node.target, OpOverload):
        return TABLE.get(str(node.target))  # of a package that may not be installed
    return row


def rule_of(node: fx.Node) -> Rule | None:
    """The rule of what `node` calls; None for what stops an affine."""
    found = operator_of(node)
    return None if found is None else found.rule


def is_a(node: fx.Node, *kinds: OperatorKind) -> bool:
    """Whether what `node` calls is of one of these kinds."""
    found = operator_of(node)
    return found is not None and found.kind in kinds


def reads_numbers(user: fx.Node, value: fx.Node) -> bool:
    """Whether `user`, which takes `value`, reads its numbers, and not only its shape or dtype."""
    found = operator_of(user)
    if found is None:
        return True
    if found.looks_at is not None:
        return user.args[0] is value
    return found.kind not in ("look", "fill")


def sources_of(node: fx.Node) -> list[fx.Node]:
    """The values whose numbers `node` reads, and not only their shape or dtype."""
    return [source for source in node.all_input_nodes if reads_numbers(node, source)]


def name_of(target: Any) -> str:
    """What an operator is called, whichever way: "conv2d" for aten.conv2d.default and F.conv2d."""
    return str(getattr(target, "__name__", target)).partition(".")[0]


# What looks at the shape, dtype or device of a value alone, never at its numbers, has no rule.
define(
    "look",
    aten._assert_tensor_metadata.default,
    aten.sym_size.int,
    aten.sym_numel.default,
    aten.sym_stride.int,
    *("size", "dim", "ndimension", "numel", "stride"),
)
define("fill", aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default, fills=0.0)
define("fill", aten.ones.default, aten.ones_like.default, aten.new_ones.default, fills=1.0)
define(
    "fill",
    aten.empty_like.default,
    aten.full_like.default,
    aten.new_empty.default,
    aten.new_full.default,
)
