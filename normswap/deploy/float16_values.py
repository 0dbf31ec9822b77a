"""An ONNX file whose float16 values are such in ONNX Runtime's CPU as well.

ONNX Runtime's CPU has few float16 kernels. It computes in float32 around the others, and takes the
casts to float16 and back out between two of them: a value of 82,366 goes on as it is, where a
device that computes in float16 has infinity. A sequence that holds each value, in a session without
optimizations, keeps the casts, so that each operator gives the digits that it gives in a file of
its own. (An Identity, and most that lies between two such operators, is run in float32 with them.)
Inside an operator sums are in float32, as devices have them.

onnx's reference evaluator honours the types too, but sums in float16, and for a ResNet-50 with
GroupNorm at 224 px it takes 128 s, where this takes 0.8 s and ONNX Runtime by itself 0.6 s.
"""

from onnx import GraphProto, ModelProto, TensorProto, helper

_UNROUNDED, _HELD, _FIRST = ".unrounded", ".held", ".first"


def has_float16(graph: GraphProto) -> bool:
    """Whether a value or a weight of the graph is declared as float16."""
    values = (*graph.input, *graph.value_info, *graph.output)
    return any(tensor.data_type == TensorProto.FLOAT16 for tensor in graph.initializer) or any(
        value.type.tensor_type.elem_type == TensorProto.FLOAT16 for value in values
    )


def with_float16_kept(model: ModelProto) -> ModelProto:
    """A copy of `model` in which a sequence holds each value that may be float16."""
    copied = ModelProto()
    copied.CopyFrom(model)
    copied.graph.initializer.append(helper.make_tensor(_FIRST, TensorProto.INT64, [], [0]))
    _keep(copied.graph)
    return copied


def _keep(graph: GraphProto) -> None:
    values = (*graph.value_info, *graph.output)
    kinds = {value.name: value.type.tensor_type.elem_type for value in values}
    nodes = list(graph.node)
    del graph.node[:]
    for each in nodes:
        node = graph.node.add()
        node.CopyFrom(each)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _keep(attribute.g)
        for index, name in enumerate(each.output):
            if name and kinds.get(name) in (None, TensorProto.UNDEFINED, TensorProto.FLOAT16):
                computed, held = name + _UNROUNDED, name + _HELD
                node.output[index] = computed
                graph.node.append(helper.make_node("SequenceConstruct", [computed], [held]))
                graph.node.append(helper.make_node("SequenceAt", [held, _FIRST], [name]))
