"""Fewer bits: an ONNX file in float16, or quantized to int8, by the tools of ONNX Runtime.

- `float16`: weights and arithmetic; inputs and outputs stay float32. For GPUs: ONNX Runtime's CPU
  has hardly any float16 kernel and converts back and forth.
- `int8`: static quantization, weights per output channel, activations by the smallest and the
  largest value seen on the user's data (Jacob et al. 2018, arXiv 1712.05877); QuantizeLinear and
  DequantizeLinear stand in the file, and the runtime merges them. BatchNorms are to be folded
  before: one between quantized layers would be a layer of its own.
- `int8_weight_only` and `int4_weight_only`: the weights of matrix products, in blocks of 32 with a
  scale each, symmetric; arithmetic stays float32. For transformers, in ONNX Runtime: its operator
  MatMulNBits is no standard one.
"""

import tempfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeGuard

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

from normswap.core.ambient import loggers_silent, root_logger_kept
from normswap.core.errors import NormswapError
from normswap.deploy.diverge import Array, one_line
from normswap.deploy.statistics import normalizing
from normswap.deploy.translate import quiet

with root_logger_kept():
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

Precision = Literal["float32", "float16", "int8", "int8_weight_only", "int4_weight_only"]

# How far outputs in float16 may be from the model's, relative to the largest one. It has 11 bits,
# and a deep network some thousand roundings; measured, ResNet-50: 2e-3.
FLOAT16_TOLERANCE = 0.02

# What stays in float: onnxruntime 1.31 cannot share the scale of a Pad with the zeros it adds, nor
# quantize the constant gains of a normalization, whose statistics want float anyway.
_FLOAT = {"Pad", "InstanceNormalization", "LayerNormalization", "GroupNormalization"}

# What takes the statistics of a float16 in float32 by itself, and an affine of fixed statistics.
_STASHED = {
    "LayerNormalization",
    "RMSNormalization",
    "GroupNormalization",
    "BatchNormalization",
}


_BLOCK = 32  # of weights that share a scale


class _Feeds(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    def __init__(self, feeds: Iterable[dict[str, Array]]) -> None:
        self._feeds: Iterator[dict[str, Array]] = iter(feeds)

    def get_next(self) -> dict[str, Array] | None:
        return next(self._feeds, None)


def to_float16(path: Path, scopes: Collection[str], *, external_data: bool) -> None:
    """Rewrite the file at `path` in float16, in place.

    Args:
        scopes: Paths of the modules whose inside stays in float32.
    """
    proto = onnx.load(path)
    written = {node.name for node in proto.graph.node}
    kept = normalizing(proto.graph, scopes)
    with quiet():
        converted = convert_float_to_float16(
            proto,
            keep_io_types=True,
            op_block_list=[*DEFAULT_OP_BLOCK_LIST, "InstanceNormalization"],
            node_block_list=[node.name for node in kept if node.op_type not in _STASHED],
        )
    # onnxruntime 1.31 writes a cast of its own, of the same name, for each node that reads a value.
    single = {tuple(node.output): node for node in converted.graph.node}
    del converted.graph.node[:]
    converted.graph.node.extend(single.values())
    model = ir.from_proto(converted)
    with quiet():
        _join_casts(model, written)
        TopologicalSortPass()(model)  # before onnxruntime 1.24 the casts of the inputs stand last
    _save(ir.to_proto(model), path, external_data=external_data)


def _join_casts(model: ir.Model, written: Collection[str]) -> None:
    """Take out the casts to float16 and back between two nodes that compute in float32.

    Args:
        written: The names of the nodes that the converter did not add.
    """

    def is_added(node: ir.Node | None, to: ir.DataType) -> TypeGuard[ir.Node]:
        return (
            node is not None
            and node.op_type == "Cast"
            and node.name not in written
            and node.attributes["to"].as_int() == to
        )

    for node in model.graph:
        value = node.inputs[0] if node.inputs else None
        of_graph = node.outputs[0].is_graph_output()
        if value is not None and is_added(node, ir.DataType.FLOAT) and not of_graph:
            before = value.producer()
            if is_added(before, ir.DataType.FLOAT16):
                value = before.inputs[0]
            if value is not None and value.dtype == ir.DataType.FLOAT:
                ir.convenience.replace_all_uses_with(node.outputs[0], value)
    RemoveUnusedNodesPass()(model)


def to_int8(
    path: Path,
    feeds: Iterable[dict[str, Array]],
    scopes: Collection[str],
    *,
    external_data: bool,
) -> None:
    """Quantize the file at `path`, in place, with the ranges that `feeds` give.

    Args:
        feeds: Inputs by name, batch after batch.
        scopes: Paths of the modules whose inside stays in float32.

    Raises:
        NormswapError: ONNX Runtime cannot quantize it.
    """
    written = onnx.load(path, load_external_data=False)
    # By what they give, as the preparation may write a node anew.
    kept = {name for node in normalizing(written.graph, scopes) for name in node.output}
    with tempfile.TemporaryDirectory(prefix=".quantize-", dir=path.parent) as folder:
        prepared, quantized = Path(folder) / "prepared.onnx", Path(folder) / "quantized.onnx"
        try:
            with quiet():
                quant_pre_process(
                    path,
                    prepared,
                    skip_symbolic_shape=True,  # it needs sympy, and torch has inferred the shapes
                    save_as_external_data=external_data,
                )
                graph = onnx.load(prepared, load_external_data=False).graph
                quantize_static(
                    prepared,
                    quantized,
                    _Feeds(feeds),
                    quant_format=QuantFormat.QDQ,
                    per_channel=True,
                    # An x86 processor without VNNI adds two products in 16 bits, which saturate
                    # unless the weights have 7.
                    reduce_range=True,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    nodes_to_exclude=[
                        node.name
                        for node in graph.node
                        if node.op_type in _FLOAT or not kept.isdisjoint(node.output)
                    ],
                )
        except (NormswapError, OSError):  # of the data, or of the disk
            raise
        except Exception as error:  # onnxruntime.quantization raises whatever its parts raise
            raise NormswapError(
                f"onnxruntime.quantization cannot quantize this model ({one_line(error)}); "
                "export it in float32"
            ) from error
        model = onnx.load(quantized)
    del model.metadata_props[:]
    model.metadata_props.extend(written.metadata_props)
    _save(model, path, external_data=external_data)


def to_weight_only(path: Path, bits: int, *, external_data: bool) -> None:
    """Quantize the weights of the matrix products in the file at `path`, in place.

    Raises:
        NormswapError: there is no product with a weight.
    """
    scheme = DefaultWeightOnlyQuantConfig(block_size=_BLOCK, is_symmetric=True, bits=bits)
    quantizer = MatMulNBitsQuantizer(onnx.load(path), algo_config=scheme)
    with quiet(), loggers_silent("onnxruntime.quantization"):
        quantizer.process()
    model = quantizer.model.model
    if not any(node.op_type == "MatMulNBits" for node in model.graph.node):
        raise NormswapError(
            "there is no MatMul with a constant weight in this model, of which weight-only formats "
            "quantize the weights; take int8 for convolutions, or float16"
        )
    _save(model, path, external_data=external_data)


def _save(model: Any, path: Path, *, external_data: bool) -> None:
    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)
    onnx.save(model, path, save_as_external_data=external_data, location=data.name)
