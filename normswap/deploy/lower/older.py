"""A graph of torch's opset in the operators of an older one.

Most operators are the same in both, or have only gained types and attributes. Where that is not so,
`_FORMS` says how the older opset writes it:

- a LayerNormalization (17) as its formula (Ba et al. 2016, arXiv 1607.06450, equation 3),
- the axes of a reduction (an input since 18) as an attribute,
- a part of a shape (15) as a Slice of all of it.

onnx's own converter has no way down for these. What has none is refused by its name; onnx.checker
and the validation judge the rest.
"""

from collections.abc import Callable

import onnx_ir as ir
from onnx.defs import OpSchema, SchemaError, get_schema
from onnx_ir.convenience import get_const_tensor

from normswap.core.errors import NormswapError
from normswap.deploy.lower.emit import Emitter
from normswap.deploy.lower.long_mean import LONG

OLDEST = 13  # from which on a ReduceSum, a Squeeze and an Unsqueeze take their axes as today


def to_opset(model: ir.Model, opset: int) -> None:
    """Rewrite `model` in place in `opset`, which is OLDEST or newer and older than its own.

    Raises:
        NormswapError: an operator of it has no form there.
    """
    current = model.opset_imports[""]
    for node in list(model.graph.all_nodes()):
        if node.domain != "":
            continue
        then, now = _schema(node, opset), _schema(node, current)
        if then is not None and now is not None and then.since_version == now.since_version:
            continue
        form = _FORMS.get(node.op_type)
        written = form is not None and form(model, node, opset)
        if not written and (then is None or not _fits(node, then)):
            raise NormswapError(
                f"the operator {node.op_type} ({node.name}) has no form in opset {opset}; use "
                f"opset {now.since_version if now else current} or newer"
            )
    model.opset_imports[""] = opset


def _schema(node: ir.Node, opset: int) -> OpSchema | None:
    try:
        return get_schema(node.op_type, opset, node.domain)
    except SchemaError:
        return None


def _fits(node: ir.Node, schema: OpSchema) -> bool:
    """Whether `node` is as `schema` has it, once attributes that say nothing are gone."""
    for name, attribute in list(node.attributes.items()):
        if name not in schema.attributes:
            if attribute.value not in (0, "none", "stretch", len(node.outputs)):  # the defaults
                return False
            del node.attributes[name]
    return len(node.inputs) <= schema.max_input


def _axes_as_attribute(model: ir.Model, node: ir.Node, opset: int) -> bool:
    given = node.inputs[1] if len(node.inputs) > 1 else None
    tensor = get_const_tensor(given) if given is not None else None
    if tensor is None or not tensor.size:
        return False
    node.resize_inputs(1)
    node.attributes["axes"] = ir.AttrInt64s("axes", [int(axis) for axis in tensor.numpy().ravel()])
    node.attributes.pop("noop_with_empty_axes", None)
    return True


def _part_of_shape(model: ir.Model, node: ir.Node, opset: int) -> bool:
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", 2**31)
    x = node.inputs[0]
    if x is None:
        return False
    emit = Emitter(model, node.outputs[0], "part")
    whole = emit.op("Shape", x)
    emit.replace(emit.op("Slice", whole, emit.shape(start), emit.shape(end), emit.shape(0)))
    return True


def _layer_normalization(model: ir.Model, node: ir.Node, opset: int) -> bool:
    x, gain = node.inputs[:2]
    alone = all(not each.uses() for each in node.outputs[1:])
    float32 = x is not None and x.dtype == ir.DataType.FLOAT
    if x is None or gain is None or x.shape is None or not alone or not float32:
        return False
    first = node.attributes.get_int("axis", -1) % len(x.shape)
    axes = list(range(first, len(x.shape)))
    length = 1
    for size in x.shape[first:]:
        length *= size if isinstance(size, int) else LONG
    emit = Emitter(model, node.outputs[0], "layer")
    rest = emit.op("Sub", x, emit.op("ReduceMean", x, axes=axes))
    if length >= LONG:  # the mean of what is left of it (`long_mean`)
        rest = emit.op("Sub", rest, emit.op("ReduceMean", rest, axes=axes))
    variance = emit.op("ReduceMean", emit.op("Mul", rest, rest), axes=axes)
    epsilon = emit.constant(node.attributes.get_float("epsilon", 1e-5))
    normal = emit.op("Div", rest, emit.op("Sqrt", emit.op("Add", variance, epsilon)))
    scaled = emit.op("Mul", normal, gain)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    emit.replace(scaled if bias is None else emit.op("Add", scaled, bias))
    return True


_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
_FORMS: dict[str, Callable[[ir.Model, ir.Node, int], bool]] = {
    **{f"Reduce{kind}": _axes_as_attribute for kind in _REDUCTIONS},
    "LayerNormalization": _layer_normalization,
    "Shape": _part_of_shape,
}
