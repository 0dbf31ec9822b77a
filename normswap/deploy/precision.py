"""Fewer bits: an ONNX file in float16, or quantized to int8, by the tools of ONNX Runtime.

- `float16`: weights and arithmetic; inputs and outputs stay float32. For GPUs: ONNX Runtime's CPU
  has hardly any float16 kernel and converts back and forth.
- `int8`: static quantization, weights per output channel, activations by the smallest and the
  largest value seen on the user's data (Jacob et al. 2018, arXiv 1712.05877); QuantizeLinear and
  DequantizeLinear stand in the file, and the runtime merges them. BatchNorms are to be folded
  before: one between quantized layers would be a layer of its own.
"""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import TopologicalSortPass
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16

from normswap.core.errors import NormswapError
from normswap.deploy.diverge import Array, one_line
from normswap.deploy.translate import quiet

Precision = Literal["float32", "float16", "int8"]

# How far outputs may be from the model's, relative to the largest one, before a check has failed.
# float16 has 11 bits, and a deep network some thousand roundings; measured, ResNet-50: 2e-3. What
# int8 does to a network is for its accuracy to tell; beyond a half, nothing is left of it.
TOLERANCE: dict[Precision, float] = {"float16": 0.02, "int8": 0.5}

# What stays in float: onnxruntime 1.31 cannot share the scale of a Pad with the zeros it adds, nor
# quantize the constant gains of a normalization, whose statistics want float anyway.
_FLOAT = {"Pad", "InstanceNormalization", "LayerNormalization", "GroupNormalization"}


class _Feeds(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    def __init__(self, feeds: Iterable[dict[str, Array]]) -> None:
        self._feeds: Iterator[dict[str, Array]] = iter(feeds)

    def get_next(self) -> dict[str, Array] | None:
        return next(self._feeds, None)


def to_float16(path: Path, *, external_data: bool) -> None:
    """Rewrite the file at `path` in float16, in place."""
    with quiet():
        model = ir.from_proto(convert_float_to_float16(onnx.load(path), keep_io_types=True))
    TopologicalSortPass()(model)  # before onnxruntime 1.24 the casts of the inputs stand last
    _save(ir.to_proto(model), path, external_data=external_data)


def to_int8(path: Path, feeds: Iterable[dict[str, Array]], *, external_data: bool) -> None:
    """Quantize the file at `path`, in place, with the ranges that `feeds` give.

    Args:
        feeds: Inputs by name, batch after batch.

    Raises:
        NormswapError: ONNX Runtime cannot quantize it.
    """
    metadata = onnx.load(path, load_external_data=False).metadata_props
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
                    nodes_to_exclude=[node.name for node in graph.node if node.op_type in _FLOAT],
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
    model.metadata_props.extend(metadata)
    _save(model, path, external_data=external_data)


def _save(model: Any, path: Path, *, external_data: bool) -> None:
    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)
    onnx.save(model, path, save_as_external_data=external_data, location=data.name)
