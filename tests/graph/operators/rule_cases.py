"""For every operator of the affine table a strategy that draws calls of it, small and in float64.

A `Case` also says, by hand and not by our code, what has to hold of the call: whether a BatchNorm
after it must move through it (upstream), whether one before it must (downstream), and whether a
shift does.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch._ops import OpOverload

from normswap.graph.operators.operator import TABLE

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Value:
    """An input that another operator computes, its channels along `axis`."""

    shape: tuple[int, ...]
    axis: int = 1
    minimum: float | None = None

    def sample(self) -> Tensor:
        """Random numbers of this shape."""
        if self.minimum is not None:
            return torch.rand(self.shape, dtype=torch.float64) + self.minimum
        return torch.randn(self.shape, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Constant:
    """A parameter (floating point) or buffer (integers) of the model."""

    tensor: Tensor


@dataclass(frozen=True)
class Case:
    """A call of an operator.

    Attributes:
        out_axis: where the channels of the first value lie in the output.
        upstream, downstream: whether a BatchNorm after, or before, moves through or into it.
        shift: whether the shift does, too.
        inner: the operator with several outputs of which `target` takes one.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    out_axis: int = 1
    upstream: bool = True
    downstream: bool = True
    shift: bool = True
    inner: Any = None

    def leaves(self) -> list[Value | Constant]:
        """The tensors among the arguments, in order."""
        found: list[Value | Constant] = []
        self.fill(lambda leaf: found.append(leaf))
        return found

    def fill(self, tensor: Callable[[Any], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with every tensor replaced by what `tensor` gives for it."""

        def filled(item: Any) -> Any:
            if isinstance(item, (Value, Constant)):
                return tensor(item)
            return [filled(each) for each in item] if isinstance(item, list) else item

        args = tuple(filled(item) for item in self.args)
        return args, {name: filled(item) for name, item in self.kwargs.items()}

    def run(self, tensor: Callable[[Any], Any]) -> Any:
        """What the operator computes."""
        args, kwargs = self.fill(tensor)
        if self.inner is not None:
            return self.inner(*args[:-1], **kwargs)[args[-1]]
        return self.target(*args, **kwargs)


Draw = st.DrawFn
Builder = Callable[[Draw, Any], Case]
CASES: dict[Any, Builder] = {}
# The rules of the table, by what a captured graph calls.
RULES = {
    target: row.rule
    for target, row in TABLE.items()
    if row.rule is not None
    and (isinstance(target, OpOverload) or target is operator.getitem)
    and row.kind != "grouped matmul"  # which has no kernel in float64: tests/passes/test_experts.py
}


def case(*targets: Any) -> Callable[[Builder], Builder]:
    """Register a builder of cases for these operators."""

    def register(builder: Builder) -> Builder:
        CASES.update(dict.fromkeys(targets, builder))
        return builder

    return register


def cases(target: Any) -> st.SearchStrategy[Case]:
    """Calls of `target`."""
    return st.composite(lambda draw: CASES[target](draw, target))()


def size(draw: Draw, low: int = 2, high: int = 4) -> int:
    """The size of an axis."""
    return draw(st.integers(low, high))


def image(draw: Draw, low: int = 2, high: int = 4, dims: int = 2) -> Value:
    """A value (N, C, ...) with `dims` axes in space."""
    sizes = [size(draw, low, high) for _ in range(dims)]
    return Value((size(draw, 1, 2), size(draw), *sizes))


def constant(*shape: int) -> Constant:
    """A parameter of random numbers."""
    return Constant(torch.randn(shape, dtype=torch.float64))


def indices(numbers: Any, *shape: int) -> Constant:
    """A buffer of integers."""
    index = torch.tensor(numbers)
    return Constant(index.view(shape) if shape else index)


# --- what only moves elements -----------------------------------------------------------------


@case(aten.alias.default, aten.clone.default, aten.contiguous.default, aten.lift_fresh_copy.default)
@case(aten.detach.default, aten.detach_.default, aten.neg.default, aten.neg_.default)
def _same(draw: Draw, target: Any) -> Case:
    return Case(target, (image(draw),))


@case(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def _view(draw: Draw, target: Any) -> Case:
    x = image(draw)
    n, c, h, w = x.shape
    if draw(st.booleans()):
        return Case(target, (x, [1, n, c, -1]), out_axis=2)
    return Case(target, (x, draw(st.sampled_from([[n, c, h * w], [n, c, w, 1, h]]))))


@case(aten.view_as.default, aten.reshape_as.default)
def _view_as(draw: Draw, target: Any) -> Case:
    x = image(draw)
    n, c, h, w = x.shape
    return Case(target, (x, Value((n, c, w * h))))


@case(aten.flatten.using_ints)
def _flatten(draw: Draw, target: Any) -> Case:
    last = draw(st.booleans())
    # With the channels spread over the flattened axis a BatchNorm of that axis has too many.
    return Case(target, (image(draw, 2, 3), 2 if last else 1, -1), upstream=last, downstream=True)


@case(aten.unflatten.int)
def _unflatten(draw: Draw, target: Any) -> Case:
    n, c, h, w = image(draw).shape
    return Case(target, (Value((n, c, h * w)), 2, [h, -1]))


@case(aten.squeeze.default)
def _squeeze(draw: Draw, target: Any) -> Case:
    return Case(target, (Value((2, size(draw), 1, size(draw))),))


@case(aten.squeeze.dim, aten.squeeze.dims)
def _squeeze_dim(draw: Draw, target: Any) -> Case:
    x = Value((1, size(draw), 1, size(draw)))
    if target is aten.squeeze.dim:
        return Case(target, (x, -2))
    return Case(target, (x, [0, 2]), out_axis=0)


@case(aten.unsqueeze.default)
def _unsqueeze(draw: Draw, target: Any) -> Case:
    dim = draw(st.integers(-5, 4))
    return Case(target, (image(draw), dim), out_axis=2 if dim % 5 <= 1 else 1)


@case(aten.permute.default)
def _permute(draw: Draw, target: Any) -> Case:
    order = draw(st.permutations(range(4)))
    return Case(target, (image(draw), list(order)), out_axis=order.index(1))


@case(aten.transpose.int, aten.swapaxes.default, aten.swapdims.default)
def _transpose(draw: Draw, target: Any) -> Case:
    a, b = draw(st.integers(-4, 3)), draw(st.integers(-4, 3))
    order = list(range(4))
    order[a], order[b] = order[b], order[a]
    return Case(target, (image(draw), a, b), out_axis=order.index(1))


@case(aten.t.default, aten.numpy_T.default)
def _t(draw: Draw, target: Any) -> Case:
    return Case(target, (Value((size(draw), size(draw))),), out_axis=0)


@case(aten.mT.default)
def _mt(draw: Draw, target: Any) -> Case:
    return Case(target, (image(draw),))


@case(aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist)
def _movedim(draw: Draw, target: Any) -> Case:
    if target in (aten.movedim.int, aten.moveaxis.int):
        to = draw(st.integers(-4, 3))
        return Case(target, (image(draw), 1, to), out_axis=to % 4)
    return Case(target, (image(draw), [1, 0], [-1, 1]), out_axis=3)


@case(aten.expand.default, aten.expand_as.default)
def _expand(draw: Draw, target: Any) -> Case:
    x, h = Value((1, size(draw), 1, size(draw))), size(draw)
    shape = (2, x.shape[1], h, x.shape[3])
    if target is aten.expand.default:
        return Case(target, (x, [3, *shape[:1], -1, h, -1]), out_axis=2)
    return Case(target, (x, Value(shape)))


@case(aten.repeat.default, aten.tile.default)
def _repeat(draw: Draw, target: Any) -> Case:
    channels = draw(st.integers(1, 2))
    # A BatchNorm after it has a channel of its own for each copy.
    return Case(target, (image(draw), [1, channels, 2, 1]), upstream=channels == 1)


@case(aten.repeat_interleave.self_int)
def _repeat_interleave(draw: Draw, target: Any) -> Case:
    dim = draw(st.integers(0, 3))
    return Case(target, (image(draw), 2, dim), upstream=dim != 1)


@case(aten.flip.default)
def _flip(draw: Draw, target: Any) -> Case:
    dims = draw(st.lists(st.integers(0, 3), min_size=1, unique=True))
    return Case(target, (image(draw), dims))


@case(aten.roll.default)
def _roll(draw: Draw, target: Any) -> Case:
    return Case(target, (image(draw), [draw(st.integers(-3, 3)), 1], [1, 3]))


@case(aten.rot90.default)
def _rot90(draw: Draw, target: Any) -> Case:
    k = draw(st.integers(0, 3))
    return Case(target, (image(draw), k, [1, 2]), out_axis=2 if k % 2 else 1)


@case(aten.cat.default, aten.concat.default)
def _cat(draw: Draw, target: Any) -> Case:
    x, dim = image(draw), draw(st.integers(0, 3))
    other = list(x.shape)
    other[dim] = size(draw, 1, 3)
    # Along another axis a part of each channel has the affine and a part has not.
    return Case(target, ([x, Value(tuple(other))], dim), downstream=dim == 1)


@case(aten.stack.default)
def _stack(draw: Draw, target: Any) -> Case:
    x, dim = image(draw), draw(st.integers(0, 4))
    args = ([x, Value(x.shape)], dim)
    return Case(target, args, out_axis=2 if dim <= 1 else 1, downstream=False)


@case(aten.select.int)
def _select(draw: Draw, target: Any) -> Case:
    dim = draw(st.sampled_from([0, 2, 3]))
    return Case(target, (image(draw), dim, 0), out_axis=0 if dim == 0 else 1)


@case(aten.slice.Tensor)
def _slice(draw: Draw, target: Any) -> Case:
    dim = draw(st.integers(1, 3))
    return Case(target, (image(draw, 3), dim, draw(st.integers(0, 1)), 4, draw(st.integers(1, 2))))


@case(aten.narrow.default)
def _narrow(draw: Draw, target: Any) -> Case:
    return Case(target, (image(draw), draw(st.integers(1, 3)), 0, draw(st.integers(1, 2))))


@case(aten.index_select.default)
def _index_select(draw: Draw, target: Any) -> Case:
    x, dim = image(draw), draw(st.integers(1, 3))
    chosen = draw(st.lists(st.integers(0, x.shape[dim] - 1), min_size=1, max_size=4))
    upstream = dim != 1 or len(set(chosen)) == len(chosen)
    return Case(target, (x, dim, indices(chosen)), upstream=upstream)


@case(aten.index.Tensor)
def _index(draw: Draw, target: Any) -> Case:
    x = image(draw)
    chosen = draw(st.permutations(range(x.shape[1])))
    return Case(target, (x, [None, indices(chosen)]))


@case(aten.gather.default)
def _gather(draw: Draw, target: Any) -> Case:
    x = image(draw)
    chosen = draw(st.permutations(range(x.shape[1])))
    index = torch.tensor(chosen).view(1, -1, 1, 1).expand(x.shape).contiguous()
    return Case(target, (x, 1, Constant(index)))


@case(aten.diagonal.default)
def _diagonal(draw: Draw, target: Any) -> Case:
    return Case(target, (image(draw), draw(st.integers(-1, 1)), 2, 3))


@case(aten.unfold.default)
def _unfold(draw: Draw, target: Any) -> Case:
    return Case(target, (image(draw), draw(st.integers(2, 3)), 2, draw(st.integers(1, 2))))


@case(aten.im2col.default)
def _im2col(draw: Draw, target: Any) -> Case:
    kernel, padding = draw(st.integers(1, 2)), draw(st.integers(0, 1))
    args = (image(draw), [kernel, kernel], [1, 1], [padding, padding], [1, 1])
    return Case(target, args, upstream=kernel == 1, shift=not padding)


@case(aten.pixel_shuffle.default)
def _pixel_shuffle(draw: Draw, target: Any) -> Case:
    n, c, h, w = image(draw).shape
    r = draw(st.integers(1, 2))
    return Case(target, (Value((n, c * r * r, h, w)), r), downstream=r == 1)


@case(aten.pixel_unshuffle.default)
def _pixel_unshuffle(draw: Draw, target: Any) -> Case:
    n, c, h, w = image(draw).shape
    r = draw(st.integers(1, 2))
    return Case(target, (Value((n, c, h * r, w * r)), r), upstream=r == 1)


@case(aten.channel_shuffle.default, aten.native_channel_shuffle.default)
def _channel_shuffle(draw: Draw, target: Any) -> Case:
    n, c, h, w = image(draw).shape
    groups = draw(st.integers(1, 3))
    return Case(target, (Value((n, c * groups, h, w)), groups))


@case(aten.pad.default, aten.constant_pad_nd.default)
def _pad(draw: Draw, target: Any) -> Case:
    amounts = draw(st.lists(st.integers(0, 1), min_size=4, max_size=4))
    modes = ["constant"] if target is aten.constant_pad_nd.default else ["constant", "reflect"]
    mode = draw(st.sampled_from(modes))
    kwargs = {"mode": mode} if mode != "constant" else {}
    # At another size zeros may come in where there are none at this one.
    return Case(target, (image(draw), amounts), kwargs, shift=mode != "constant")


def _pad_in_space(dims: int) -> Builder:
    def build(draw: Draw, target: Any) -> Case:
        amounts = draw(st.lists(st.integers(0, 1), min_size=2 * dims, max_size=2 * dims))
        return Case(target, (image(draw, dims=dims), amounts))

    return build


case(aten.reflection_pad1d.default, aten.replication_pad1d.default)(_pad_in_space(1))
case(aten.reflection_pad2d.default, aten.replication_pad2d.default)(_pad_in_space(2))
case(aten.reflection_pad3d.default, aten.replication_pad3d.default)(_pad_in_space(3))


@case(operator.getitem)
def _getitem(draw: Draw, target: Any) -> Case:
    x, dim = image(draw, 3), draw(st.integers(1, 3))
    n = x.shape[dim]
    inner, args = draw(
        st.sampled_from(
            [
                (aten.split.Tensor, (1, dim)),
                (aten.split_with_sizes.default, ([1, n - 1], dim)),
                (aten.chunk.default, (2, dim)),
                (aten.tensor_split.sections, (2, dim)),
                (aten.tensor_split.indices, ([1], dim)),
                (aten.unbind.int, (0,)),
            ]
        )
    )
    at, out_axis = (0, 0) if inner is aten.unbind.int else (1, 1)
    if x.shape[1] < 2 and dim == 1:
        at = 0
    return Case(target, (x, *args, at), inner=inner, out_axis=out_axis)


# --- rows -----------------------------------------------------------------------------------


@case(aten.index_add.default, aten.index_add_.default)
@case(aten.scatter_add.default, aten.scatter_add_.default)
def _scatter(draw: Draw, target: Any) -> Case:
    rows, channels, taken = size(draw), size(draw), size(draw)
    chosen = draw(st.lists(st.integers(0, rows - 1), min_size=taken, max_size=taken))
    index = indices(chosen)
    if "scatter" in str(target):
        index = Constant(index.tensor[:, None].expand(taken, channels).contiguous())
    # A shift of what it is added to passes, one of the rows does not.
    return Case(target, (Value((rows, channels)), 0, index, Value((taken, channels))))


# --- what acts on each element alone ------------------------------------------------------------


@case(aten.dropout.default, aten.dropout_.default, aten.alpha_dropout.default)
@case(aten.feature_dropout.default, aten.feature_dropout_.default, aten.alpha_dropout_.default)
@case(aten.feature_alpha_dropout.default, aten.feature_alpha_dropout_.default)
def _dropout(draw: Draw, target: Any) -> Case:
    return Case(target, (image(draw), 0.5, False))


@case(aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default)
def _to(draw: Draw, target: Any) -> Case:
    args: dict[Any, tuple[Any, ...]] = {
        aten.to.dtype: (torch.float64,),
        aten.to.device: (torch.device("cpu"), torch.float64),
    }
    kwargs = {} if target in args else {"dtype": torch.float64}
    return Case(target, (image(draw), *args.get(target, ())), kwargs)


@case(aten.type_as.default)
def _type_as(draw: Draw, target: Any) -> Case:
    return Case(target, (image(draw), image(draw)))


def _broadcast(draw: Draw, x: Value) -> tuple[int, ...]:
    """A shape that fits to `x`, and has its channels."""
    spread = [draw(st.booleans()) for _ in x.shape]
    return tuple(1 if axis != 1 and spread[axis] else n for axis, n in enumerate(x.shape))


@case(aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.sub_.Tensor, aten.rsub.Tensor)
def _sum(draw: Draw, target: Any) -> Case:
    x = image(draw)
    kwargs = {"alpha": draw(st.sampled_from([2, 0.5]))} if draw(st.booleans()) else {}
    other: Value | Constant = Value(_broadcast(draw, x))
    if draw(st.booleans()):
        other = constant(*draw(st.sampled_from([(x.shape[1], 1, 1), (1, 1)])))
    return Case(target, (x, other), kwargs)


@case(aten.add.Scalar, aten.sub.Scalar, aten.rsub.Scalar)
def _sum_number(draw: Draw, target: Any) -> Case:
    number = draw(st.sampled_from([0.0, 2.0, -3.0]))
    return Case(target, (image(draw), number, draw(st.sampled_from([1, 2]))))


@case(aten.mul.Scalar, aten.div.Scalar)
def _product_number(draw: Draw, target: Any) -> Case:
    return Case(target, (image(draw), draw(st.sampled_from([2, -0.5, 3.0]))))


@case(aten.mul.Tensor, aten.mul_.Tensor)
def _product(draw: Draw, target: Any) -> Case:
    x = image(draw)
    kind = draw(st.sampled_from(["number", "one constant", "gate", "constant"]))
    if kind == "number":
        return Case(target, (x, draw(st.sampled_from([2.0, -0.5]))))
    if kind == "one constant":
        return Case(target, (x, constant(1, 1)))
    other = Value(_broadcast(draw, x)) if kind == "gate" else constant(x.shape[1], 1, 1)
    return Case(target, (x, other), shift=False)


@case(aten.div.Tensor, aten.div_.Tensor)
def _quotient(draw: Draw, target: Any) -> Case:
    x = image(draw)
    kind = draw(st.sampled_from(["number", "gate", "constant"]))
    if kind == "number":
        return Case(target, (x, draw(st.sampled_from([2.0, -0.5]))))
    if kind == "constant":
        return Case(target, (x, constant(x.shape[1], 1, 1)))
    return Case(target, (x, Value(_broadcast(draw, x), minimum=0.5)), shift=False)


# --- windows ------------------------------------------------------------------------------------


def _avg_pool(dims: int) -> Builder:
    def build(draw: Draw, target: Any) -> Case:
        kernel, stride = size(draw, 2, 3), size(draw, 1, 2)
        padding, ceil = draw(st.integers(0, 1)), draw(st.booleans())
        counts, divisor = draw(st.booleans()), draw(st.sampled_from([None, 5]))
        args = (image(draw, 3, 5, dims), [kernel], [stride], [padding], ceil, counts)
        if dims == 1:
            return Case(target, args, shift=not (padding and counts))
        shift = not (padding and counts) and divisor is None
        return Case(target, (*args, divisor), shift=shift)

    return build


def _adaptive(dims: int) -> Builder:
    def build(draw: Draw, target: Any) -> Case:
        return Case(target, (image(draw, 3, 5, dims), [size(draw, 1, 4) for _ in range(dims)]))

    return build


def _max_pool(dims: int) -> Builder:
    def build(draw: Draw, target: Any) -> Case:
        kernel, stride, padding = size(draw, 2, 3), size(draw, 1, 2), draw(st.integers(0, 1))
        dilation = draw(st.integers(1, 2)) if kernel == 2 else 1
        args = ([kernel], [stride], [padding], [dilation], draw(st.booleans()))
        return Case(target, (image(draw, 3, 5, dims), *args))

    return build


def _resize(dims: int, *, corners: bool) -> Builder:
    def build(draw: Draw, target: Any) -> Case:
        args: list[Any] = [image(draw, 2, 4, dims)]
        factors = draw(st.booleans()) and target._overloadname == "vec"
        args.append(None if factors else [size(draw, 2, 6) for _ in range(dims)])
        if corners:
            args.append(draw(st.booleans()))
        if target._overloadname == "vec":
            args.append([2.0] * dims if factors else None)
        return Case(target, tuple(args))

    return build


for _dims, _pool in enumerate((aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d), 1):
    case(_pool.default)(_avg_pool(_dims))
for _dims, _pool in enumerate((aten.max_pool1d, aten.max_pool2d, aten.max_pool3d), 1):
    case(_pool.default)(_max_pool(_dims))
case(aten.adaptive_avg_pool1d.default)(_adaptive(1))
case(aten.adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d.default)(_adaptive(2))
case(aten.adaptive_avg_pool3d.default)(_adaptive(3))
for _dims, _names in {
    1: ("upsample_nearest1d",),
    2: ("upsample_nearest2d", "_upsample_nearest_exact2d"),
    3: ("upsample_nearest3d",),
}.items():
    for _name in _names:
        _packet = getattr(aten, _name)
        case(_packet.default, _packet.vec)(_resize(_dims, corners=False))
for _dims, _names in {
    1: ("upsample_linear1d",),
    2: ("upsample_bilinear2d", "upsample_bicubic2d"),
    3: ("upsample_trilinear3d",),
}.items():
    for _name in _names:
        _packet = getattr(aten, _name)
        case(_packet.default, _packet.vec)(_resize(_dims, corners=True))
case(aten._upsample_bilinear2d_aa.vec)(_resize(2, corners=True))


@case(aten.mean.dim, aten.amax.default)
def _reduce(draw: Draw, target: Any) -> Case:
    dims = draw(st.lists(st.sampled_from([0, 2, -1]), min_size=1, unique=True))
    keep = draw(st.booleans())
    return Case(target, (image(draw), dims, keep), out_axis=0 if 0 in dims and not keep else 1)


@case(aten.sum.dim_IntList)
def _sum_over(draw: Draw, target: Any) -> Case:
    dims = draw(st.lists(st.sampled_from([0, 2, -1]), min_size=1, unique=True))
    keep = draw(st.booleans())
    out_axis = 0 if 0 in dims and not keep else 1
    return Case(target, (image(draw), dims, keep), out_axis=out_axis, shift=False)


@case(aten.sum.default)
def _sum_of_all(draw: Draw, target: Any) -> Case:
    return Case(target, (Value((2, 1, size(draw), 3)),), out_axis=0, shift=False)


@case(aten.mean.default)
def _mean(draw: Draw, target: Any) -> Case:
    return Case(target, (Value((2, 1, size(draw), 3)),), out_axis=0)


# --- weights ------------------------------------------------------------------------------------


def _conv(dims: int, *, transposed: bool) -> Builder:
    def build(draw: Draw, target: Any) -> Case:
        groups, kernel = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        inputs, outputs = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
        x = Value((size(draw, 1, 2), inputs, *[size(draw, 3, 4) for _ in range(dims)]))
        stride, dilation = draw(st.integers(1, 2)), draw(st.integers(1, 2))
        named = target._overloadname == "padding"
        padding: Any = draw(st.sampled_from(["same", "valid"] if named else [0, 1]))
        pads = padding == 1 or (padding == "same" and kernel > 1)
        biased = draw(st.booleans())
        shape = (inputs, outputs // groups) if transposed else (outputs, inputs // groups)
        weight = constant(*shape, *[kernel] * dims)
        args = [x, weight, constant(outputs) if biased else None]
        args += [
            [1 if padding == "same" else stride] * dims,
            padding if named else [padding] * dims,
        ]
        more = [draw(st.integers(0, stride - 1)) if transposed else 0] * dims
        if target is aten.convolution.default:
            args += [[dilation] * dims, transposed, more, groups]
        elif transposed:
            args += [more, groups, [dilation] * dims]
        else:
            args += [[dilation] * dims, groups]
        # Neither is right for a shift that comes in where windows overlap differently.
        overlaps = transposed and (kernel > 1 or stride > 1)
        return Case(target, tuple(args), downstream=not (pads or overlaps), shift=biased)

    return build


for _dims, _packet in enumerate((aten.conv1d, aten.conv2d, aten.conv3d), 1):
    case(_packet.default, _packet.padding)(_conv(_dims, transposed=False))


@case(aten.convolution.default)
def _convolution(draw: Draw, target: Any) -> Case:
    return _conv(draw(st.integers(1, 3)), transposed=draw(st.booleans()))(draw, target)


case(aten.conv_transpose1d.default)(_conv(1, transposed=True))
case(aten.conv_transpose2d.input)(_conv(2, transposed=True))
case(aten.conv_transpose3d.input)(_conv(3, transposed=True))


@case(aten.linear.default)
def _linear(draw: Draw, target: Any) -> Case:
    inputs, outputs, biased = size(draw), size(draw), draw(st.booleans())
    shape = draw(st.sampled_from([(3, inputs), (2, 3, inputs), (1, 2, 3, inputs)]))
    bias = constant(outputs) if biased else None
    args = (Value(shape, len(shape) - 1), constant(outputs, inputs), bias)
    return Case(target, args, out_axis=len(shape) - 1, shift=biased)


@case(aten.matmul.default, aten.mm.default)
def _matmul(draw: Draw, target: Any) -> Case:
    rows, inner, columns = size(draw), size(draw), size(draw)
    kind = draw(st.sampled_from(["x w", "w x", "rows", "positions"]))
    batch = () if target is aten.mm.default else draw(st.sampled_from([(), (2,)]))
    rank = len(batch) + 2
    if kind == "x w":
        args = (Value((*batch, rows, inner), rank - 1), constant(inner, columns))
        return Case(target, args, out_axis=rank - 1, shift=False)
    if kind == "w x":  # channels along the rows
        args = (constant(rows, inner), Value((*batch, inner, columns), rank - 2))
        return Case(target, args, out_axis=rank - 2, shift=False)
    if kind == "rows":  # a sum over positions, no softmax
        args = (Value((*batch, rows, inner), rank - 2), Value((*batch, inner, columns)))
        return Case(target, args, out_axis=rank - 2, shift=False)
    args = (Value((*batch, rows, inner), rank - 1), Value((*batch, inner, columns), rank - 1))
    return Case(target, args, out_axis=rank - 1, shift=False, downstream=False)


@case(aten.bmm.default)
def _bmm(draw: Draw, target: Any) -> Case:
    rows, inner, columns = size(draw), size(draw), size(draw)
    if draw(st.booleans()):
        args = (Value((2, rows, inner), 1), constant(2, inner, columns))
        return Case(target, args, out_axis=1, shift=False)
    args = (Value((2, rows, inner), 2), constant(2, inner, columns))
    return Case(target, args, out_axis=2, shift=False)


@case(aten.einsum.default)
def _einsum(draw: Draw, target: Any) -> Case:
    a, b, c = size(draw), size(draw), size(draw)
    equation, shapes, axis, out_axis = draw(
        st.sampled_from(
            [
                ("nchw,oc->nohw", ((2, a, b, 3), (c, a)), 1, 1),
                ("oc,ncl->nol", ((c, a), (2, a, b)), 1, 1),
                ("nlc,co->nlo", ((2, b, a), (a, c)), 2, 2),
                ("ncl,co", ((2, a, b), (a, c)), 1, 2),
                ("nlc,hcd->nlhd", ((2, b, a), (2, a, c)), 2, 3),
            ]
        )
    )
    first = Value(shapes[0], axis), constant(*shapes[1])
    last = constant(*shapes[0]), Value(shapes[1], axis)
    operands = list(last if equation.startswith("oc") else first)
    return Case(target, (equation, operands), out_axis=out_axis, shift=False)


@case(aten.scaled_dot_product_attention.default)
def _attention(draw: Draw, target: Any) -> Case:
    queries, keys, depth = size(draw), size(draw), size(draw)
    args = (
        constant(2, 1, queries, 3),
        constant(2, 1, keys, 3),
        Value((2, 1, keys, depth), 3),
    )
    return Case(target, args, out_axis=3)


@case(aten.addmm.default)
def _addmm(draw: Draw, target: Any) -> Case:
    inputs, outputs = size(draw), size(draw)
    args = (constant(outputs), Value((3, inputs)), constant(inputs, outputs))
    return Case(target, args)


@case(aten.embedding.default)
def _embedding(draw: Draw, target: Any) -> Case:
    rows, channels = size(draw), size(draw)
    chosen = draw(st.lists(st.integers(0, rows - 1), min_size=6, max_size=6))
    return Case(target, (constant(rows, channels), indices(chosen, 2, 3)), out_axis=2)


# --- normalizations by the statistics of the sample ---------------------------------------------


@case(aten.layer_norm.default, aten.rms_norm.default)
def _over_the_last_axis(draw: Draw, target: Any) -> Case:
    channels = size(draw)
    x = Value((2, size(draw), channels), 2)
    if target is aten.rms_norm.default:
        args = (x, [channels], constant(channels), 1e-5)
        return Case(target, args, out_axis=2, downstream=False, shift=False)
    biased = draw(st.booleans())
    args = (x, [channels], constant(channels), constant(channels) if biased else None)
    return Case(target, args, out_axis=2, downstream=False, shift=biased)


@case(aten.group_norm.default, aten.instance_norm.default)
def _over_space(draw: Draw, target: Any) -> Case:
    groups = draw(st.integers(1, 2))
    channels = groups * size(draw)
    x, gain, bias = Value((2, channels, 3, 2)), constant(channels), constant(channels)
    if target is aten.group_norm.default:
        return Case(target, (x, groups, gain, bias), downstream=False)
    args = (x, gain, bias, None, None, True, 0.1, 1e-5, False)
    return Case(target, args, downstream=False)
