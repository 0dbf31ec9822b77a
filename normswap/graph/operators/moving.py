"""Operators that only move elements: reshape, permute, expand, cat, slice, shuffle, unfold, pad.

One rule serves them all: the operator itself is run on the positions of its inputs' elements, which
tells for each element of the output where it comes from, so that layouts move as the values do.
"""

from dataclasses import dataclass
from hashlib import blake2b
from math import prod
from operator import getitem
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from normswap.core.compat import OpOverload
from normswap.core.errors import Unsupported
from normswap.graph.operators.layout import FREE, NONE, compressed, equal
from normswap.graph.operators.operator import define, is_a, operator_of
from normswap.graph.operators.rule import (
    Constraints,
    Context,
    Equation,
    Layouts,
    argument,
    has_argument,
    is_tensor,
    operands,
    shape_of,
)

aten = torch.ops.aten
Shape = tuple[int, ...]


@dataclass
class Positions:
    """Where the elements of an operator's output come from.

    Attributes:
        sources: its inputs.
        shapes: of these. Axes that neither the operator nor any layout tells apart have size 1.
        position: for each element of the output its position in the inputs, which are counted
            through one after the other; `count` stands for a zero that comes from nowhere.
        count: how many elements the inputs have.
        pads: whether any comes from nowhere.
    """

    sources: list[fx.Node]
    shapes: list[Shape]
    position: Tensor

    def __post_init__(self) -> None:
        self.count = sum(map(prod, self.shapes))
        self.pads = bool((self.position == self.count).any())
        self._forward: dict[tuple[bytes | None, ...], Tensor] = {}
        self._backward: dict[tuple[bytes | None, ...], dict[fx.Node, Tensor]] = {}

    def forward(self, known: Layouts) -> Tensor:
        """The layout of the output, by those of the inputs."""
        # One affine after the other, upstream and downstream, comes by with the same layouts.
        key = self._key(known)
        if key not in self._forward:
            parts = [
                known[source].expand(shape).flatten()
                if source in known
                else torch.full((prod(shape),), NONE)
                for source, shape in zip(self.sources, self.shapes, strict=True)
            ]
            flat = torch.cat([*parts, torch.tensor([FREE])])  # the last is what comes from nowhere
            taken = flat.gather(0, self.position.flatten()).view(self.position.shape)
            self._forward[key] = compressed(taken)
        return self._forward[key]

    def backward(self, node: fx.Node, known: Layouts) -> Layouts:
        """The layouts of the inputs, by that of the output, which `node` computes.

        What an input is known to carry stays where it does not reach the output.

        Raises:
            Unsupported: an element of an input would have to carry two channels.
        """
        key = _content(known[node]), *self._key(known)
        if key not in self._backward:
            parts = [
                (known[source] if source in known else unread(node, source)).expand(shape).flatten()
                for source, shape in zip(self.sources, self.shapes, strict=True)
            ]
            together = torch.cat([*parts, torch.tensor([FREE])])
            flat = self.position.flatten()
            wanted = known[node].expand(self.position.shape).flatten()
            together.scatter_(0, flat, wanted)
            read = together.gather(0, flat)
            if not torch.equal(read, wanted) and ((read != wanted) & (flat < self.count)).any():
                raise Unsupported("two channels of it come from one")
            each = torch.split(together[: self.count], [prod(shape) for shape in self.shapes])
            found = {
                source: compressed(part.view(shape))
                for source, shape, part in zip(self.sources, self.shapes, each, strict=True)
            }
            self._backward[key] = {s: part for s, part in found.items() if (part != NONE).any()}
        return self._backward[key]

    def _key(self, known: Layouts) -> tuple[bytes | None, ...]:
        return tuple(_content(known[each]) if each in known else None for each in self.sources)


class Moving:
    """out[i] = in[position[i]], or 0 where a padding has no position."""

    def propagate(self, node: fx.Node, known: Layouts, context: Context) -> Layouts:
        positions, forced = positions_of(node, known, context), dict[fx.Node, Tensor]()
        if any(source in known for source in positions.sources):
            forced[node] = positions.forward(known)
        if node in known:
            forced |= positions.backward(node, known)
        return forced

    def constraints(self, node: fx.Node, known: Layouts, context: Context) -> Constraints:
        positions = positions_of(node, known, context)
        layout = known.get(node, torch.full((1,) * positions.position.dim(), NONE))
        if not equal(positions.forward(known), layout):
            raise Unsupported("only a part of it can be followed")
        if node not in known:  # a source that lends its shape alone
            return Constraints()
        changed = [source for source in positions.sources if source in known]
        constraints = Constraints(
            [Equation({node: 1.0, source: -1.0}, "moves") for source in changed]
        )
        if positions.pads or pads_with_zeros(node):
            constraints.equations += [Equation({node: 1.0}, "its shift meets a zero padding")]
        return constraints


def _content(layout: Tensor) -> bytes:
    """What identifies a layout."""
    shape = repr(tuple(layout.shape)).encode()
    return blake2b(layout.cpu().contiguous().numpy().tobytes() + shape, digest_size=16).digest()


def pads_with_zeros(node: fx.Node) -> bool:
    """Whether zeros come in, here or at another size: how many may be computed from the size."""
    if not is_a(node, "pad") or not has_argument(node, "value"):
        return False
    return not has_argument(node, "mode") or bool(argument(node, "mode") == "constant")


def unread(node: fx.Node, source: fx.Node) -> Tensor:
    """What the elements of `source` carry that do not reach `node`, as far as `node` tells."""
    # Others that take a part of `source` say themselves what it carries.
    parts = [part for user in source.users if is_a(user, "split") for part in user.users]
    others = [user for user in source.users if not is_a(user, "split")]
    others += [part for part in parts if part.users]  # those without are not used at all
    return torch.tensor(NONE if set(others) - {node} else FREE)


def positions_of(node: fx.Node, known: Layouts, context: Context) -> Positions:
    """Where the elements of the output of an operator that moves elements come from.

    Raises:
        Unsupported: that depends on the input, or numbers other than 0 come in.
    """
    call = node.args[0] if node.target is getitem else node
    assert isinstance(call, fx.Node)
    memory = context.memory.setdefault(node, {})
    if "sources" not in memory:
        memory["sources"] = list(dict.fromkeys(operands(call)))
    kept = _kept(call, memory["sources"], known, node)
    if kept not in memory:
        memory[kept] = _run_on_positions(node, call, memory["sources"], kept, context)
    found: Positions = memory[kept]
    return found


def _kept(
    call: fx.Node, sources: list[fx.Node], known: Layouts, node: fx.Node
) -> frozenset[int] | None:
    """The axes to keep in full; None for all of them."""
    operator = operator_of(call)
    if operator is None or not operator.along:
        return None
    rank = len(shape_of(sources[0]))
    layouts = [known[value] for value in (*sources, node) if value in known]
    varying = {axis for layout in layouts for axis, size in enumerate(layout.shape) if size > 1}
    return frozenset({argument(call, "dim") % rank, *varying})


def _run_on_positions(
    node: fx.Node,
    call: fx.Node,
    sources: list[fx.Node],
    kept: frozenset[int] | None,
    context: Context,
) -> Positions:
    if has_argument(call, "value") and argument(call, "value") not in (None, 0, 0.0):
        raise Unsupported("a padding that is not 0 lies between them")

    def reduced(shape: Shape) -> Shape:
        return tuple(n if kept is None or axis in kept else 1 for axis, n in enumerate(shape))

    start, shapes, positions = 1, list[Shape](), dict[fx.Node, Tensor]()
    for source in sources:
        shapes.append(reduced(shape_of(source)))
        # Floating point, which all of these operators take; exact far beyond any size of a tensor.
        count = torch.arange(start, start + prod(shapes[-1]), dtype=torch.float64)
        positions[source] = count.view(shapes[-1])
        start += prod(shapes[-1])

    def value(argument: fx.Node) -> Any:
        return positions[argument] if argument in positions else index_of(argument, context)

    args, kwargs = fx.map_arg((call.args, dict(call.kwargs)), value)
    moved = call.target(*args, **kwargs)  # type: ignore[operator]
    if call is not node:
        moved = moved[node.args[1]]
    position = moved.reshape(reduced(shape_of(node))).to(torch.int64) - 1
    return Positions(sources, shapes, torch.where(position < 0, start - 1, position))


def order_of(node: fx.Node) -> list[int]:
    """For each axis of the output of an operator that moves axes, that of its input."""
    rank = len(shape_of(node))
    strides = [2**axis for axis in range(rank)]  # which tell the axes apart
    axes = torch.empty(2**rank).as_strided([2] * rank, strides)
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda _: axes)
    moved = node.target(*args, **kwargs)  # type: ignore[operator]
    return [strides.index(stride) for stride in moved.stride()]


def index_of(node: fx.Node, context: Context) -> Tensor:
    """The integers of an index that is the same for all inputs."""
    constant = context.constant(node)
    if constant is not None:
        return constant.cpu()
    target = node.target
    if not isinstance(target, OpOverload) or _RANDOM in target.tags or is_tensor(node):
        raise Unsupported("an index that is computed lies between them")
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda each: index_of(each, context))
    index = target(*args, **{**kwargs, **({"device": "cpu"} if "device" in kwargs else {})})
    assert isinstance(index, Tensor)
    return index


_RANDOM = torch.Tag.nondeterministic_seeded
_MOVING = Moving()
define(
    "reshape",
    aten.view.default,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    rule=_MOVING,
)
define(
    "reshape",
    aten.reshape.default,
    aten.flatten.using_ints,
    aten._unsafe_view.default,
    rule=_MOVING,
    may_alias=True,
)
define("reshape", aten.view_as.default, rule=_MOVING, looks_at="other")
define("reshape", aten.reshape_as.default, rule=_MOVING, looks_at="other", may_alias=True)
define(
    "permute",
    aten.permute.default,
    aten.transpose.int,
    aten.swapaxes.default,
    aten.swapdims.default,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.moveaxis.int,
    aten.moveaxis.intlist,
    aten.t.default,
    aten.numpy_T.default,
    aten.mT.default,
    rule=_MOVING,
)
define(
    "move",
    aten.expand.default,
    aten.repeat.default,
    aten.repeat_interleave.self_int,
    aten.tile.default,
    aten.flip.default,
    aten.roll.default,
    aten.rot90.default,
    aten.select.int,
    aten.unfold.default,
    aten.diagonal.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    aten.channel_shuffle.default,
    aten.native_channel_shuffle.default,
    getitem,  # of what has several outputs
    rule=_MOVING,
)
define("move", aten.expand_as.default, rule=_MOVING, looks_at="other")
define("move", aten.slice.Tensor, aten.narrow.default, rule=_MOVING, along=True)
define("move", aten.im2col.default, rule=_MOVING, floating=True)
define("stack", aten.stack.default, rule=_MOVING)
define("concatenate", aten.cat.default, aten.concat.default, rule=_MOVING, along=True)
define("split", aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, along=True)
define("split", aten.unbind.int, aten.tensor_split.sections, aten.tensor_split.indices)
define("pad", aten.constant_pad_nd.default, name="pad", rule=_MOVING)
define(
    "pad",
    F.pad,
    aten.pad.default,
    aten.reflection_pad1d.default,
    aten.reflection_pad2d.default,
    aten.reflection_pad3d.default,
    aten.replication_pad1d.default,
    aten.replication_pad2d.default,
    aten.replication_pad3d.default,
    name="pad",
    rule=_MOVING,
    floating=True,
)
