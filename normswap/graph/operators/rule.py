"""What a rule of the affine table is.

A propagation changes values of the graph: each changed value v becomes v' with, for the channel c
that the layout gives an element,

    v' = s[c] v + m t[c] + n (s[c] - 1)      ("upstream": it is applied before its own place), or
    v  = s[c] v' + m t[c] + n (s[c] - 1)     ("downstream": it is still to be applied),

the same of the two for all values of one propagation; m, the multiplicity of the shift, and n, the
offset, are numbers for each value, or for each of its channels. The offset comes of constants that
are added: s (v + k) + t = (s v + t + k (s - 1)) + k. An operator that connects values does one of
three things with the change:

- it *passes* it: the layouts of its values determine one another (`propagate`), and the
  multiplicities obey a linear equation (`constraints`);
- it *folds* it into a weight and a bias, on its output or input side (`constraints`);
- it *stops* it: it is not in the table, or a condition does not hold (Unsupported).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from math import prod
from types import BuiltinFunctionType
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, fx

from normswap.core.compat import OpOverload
from normswap.core.errors import Unsupported

Layouts = Mapping[fx.Node, Tensor]
Side = Literal["out", "in"]
Factor = float | Tensor  # one number, or one for each channel: (C,)


@dataclass(frozen=True)
class ChannelIndex:
    """Where the channels of an affine lie in a tensor: scale[channels].view(shape) fits it.

    Attributes:
        shape: broadcast to the tensor, or to its `view`.
        channels: for each slot the channel; None for 0, 1, 2, ...; -1 for none.
        view: the tensor is seen in this shape first (the groups of a convolution).
        over: the axes of the view to sum over for what a shift of the input adds to the bias.
    """

    shape: tuple[int, ...]
    channels: tuple[int, ...] | None = None
    view: tuple[int, ...] | None = None
    over: tuple[int, ...] = ()

    def fit(self, tensor: Tensor) -> bool:
        """Whether it is one of such a tensor."""
        view = self.view or tuple(tensor.shape)
        return tensor.numel() == prod(view) and all(
            channel_index in (1, size)
            for channel_index, size in zip(self.shape[::-1], view[::-1], strict=False)
        )


@dataclass(frozen=True)
class Folding:
    """An operator folds a change into its weight and bias.

    Attributes:
        node: the operator.
        value: the changed value, its output or an input.
        side: which of the two.
        weight, bias: what it reads; the bias is None where it has none yet.
        channel_index: of the weight.
        bias_index: of the bias; on the input side only its shape counts.
        gives_bias: whether the operator can be given a bias.
        transpose: what transposes the weight for the operator, and for it alone.
        bias_alone: the weight folds in the scale elsewhere, and the bias has to be given.
    """

    node: fx.Node
    value: fx.Node
    side: Side
    weight: fx.Node
    bias: fx.Node | None
    channel_index: ChannelIndex
    bias_index: ChannelIndex | None = None
    gives_bias: bool = True
    transpose: fx.Node | None = None
    bias_alone: bool = False

    @property
    def reads(self) -> tuple[fx.Node, ...]:
        """The nodes that read the weight and the bias."""
        return (self.node,) if self.transpose is None else (self.node, self.transpose)


@dataclass(frozen=True)
class Equation:
    """Sum of coefficient * multiplicity = 0 over some values; `why` it cannot be otherwise.

    The same holds of the offsets, to whose sum the number `added` comes.
    """

    terms: Mapping[fx.Node, Factor]
    why: str
    added: float = 0.0


@dataclass
class Constraints:
    """What holds once all layouts around an operator are known."""

    equations: list[Equation] = field(default_factory=list)
    foldings: list[Folding] = field(default_factory=list)
    positive: list[Tensor] = field(default_factory=list)  # layouts whose scales must be positive


@dataclass(frozen=True)
class Context:
    """What a rule may ask about the rest of the model.

    Attributes:
        training: what is found must hold in training mode too.
        constant: the value of a parameter, buffer or lifted constant; None for anything else.
        literal: whether the numbers that an operator is given are the same for every input.
        memory: what a rule has found out about a node, for the next time.
        computed: whether a forward computes a weight itself, from tensors of modules alone.
        numbers: the numbers of a constant that stay what they are; None for anything else.
        channels: how many channels the affine has.
        through: a shift passes products with a constant, instead of being stopped by it.
        scale_alone: the shift stays where it is, and only the scale moves.
        stopping: the products with a constant that stopped a shift, and could pass it.
    """

    training: bool
    constant: Callable[[fx.Node], Tensor | None]
    literal: Callable[[fx.Node], bool]
    memory: dict[fx.Node, Any] = field(default_factory=dict)
    computed: Callable[[fx.Node], bool] = lambda _: False
    numbers: Callable[[fx.Node], Tensor | None] = lambda _: None
    channels: int = 0
    through: bool = False
    scale_alone: bool = False
    stopping: list[fx.Node] = field(default_factory=list)


@runtime_checkable
class Rule(Protocol):
    """How a change goes through, or into, one operator."""

    def propagate(self, node: fx.Node, known: Layouts, context: Context) -> Layouts:
        """The layouts that those in `known` force on other values of this operator."""
        ...

    def constraints(self, node: fx.Node, known: Layouts, context: Context) -> Constraints:
        """What is left to hold, now that all layouts are known."""
        ...


def argument(node: fx.Node, name: str) -> Any:
    """The argument `name` of a call, wherever it was given, or its default.

    Raises:
        Unsupported: the operator has none of that name.
    """
    return argument_of(node.target, node.args, node.kwargs, name)


def argument_of(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> Any:
    """As `argument`, of an operator or a function of torch that is called with these."""
    if isinstance(target, BuiltinFunctionType):  # torch.batch_norm has ATen's signature, and none
        target = getattr(torch.ops.aten, target.__name__).default
    formals: Sequence[Any]
    if isinstance(target, OpOverload):
        formals, default = target._schema.arguments, "default_value"
    else:
        formals, default = list(signature(target).parameters.values()), "default"
    for position, formal in enumerate(formals):
        if formal.name == name:
            if position < len(args):
                return args[position]
            return kwargs.get(name, getattr(formal, default))
    raise Unsupported(f"an operator without the argument {name} lies between them")


def has_argument(node: fx.Node, name: str) -> bool:
    """Whether the operator has an argument of that name."""
    return any(formal.name == name for formal in node.target._schema.arguments)  # type: ignore[union-attr]


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of the tensor that a captured ATen node computes."""
    return tuple(node.meta["val"].shape)


def is_tensor(node: Any) -> bool:
    """Whether a captured node computes one floating-point tensor: only those carry an affine."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def operands(node: fx.Node) -> list[fx.Node]:
    """The floating-point tensors that `node` computes with."""
    return [source for source in node.all_input_nodes if is_tensor(source)]


def mutates(node: fx.Node) -> fx.Node | None:
    """The value that an operator writes into, if it does."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return None
    written = node.args[0]
    return written if isinstance(written, fx.Node) else None


def passes(*values: fx.Node, why: str = "") -> list[Equation]:
    """The equations by which all values have the shift of the first."""
    return [Equation({values[0]: 1.0, other: -1.0}, why) for other in values[1:]]


def no_shift(*values: fx.Node, why: str) -> list[Equation]:
    """The equations by which no shift reaches the values."""
    return [Equation({value: 1.0}, why) for value in values]
