"""A file in fewer bits gives nearly what the model gives; its size may be left open."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import normswap
from normswap.core.errors import NormswapError
from normswap.demo.digits import digits, digits_data


@pytest.fixture(scope="module")
def batches() -> list[torch.Tensor]:
    return list(digits_data("train")[0][:256].split(64))


def right(path: Path) -> float:
    """The share of the digits that a file gets right, by ONNX Runtime alone."""
    images, labels = digits_data("test")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return float((logits.argmax(1) == labels.numpy()).mean())


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def test_int8_folds_quantizes_and_keeps_the_predictions(tmp_path, batches):
    model, files = digits(), {name: tmp_path / f"{name}.onnx" for name in ("float32", "int8")}
    plain = normswap.export(model, batches[0], files["float32"])
    report = normswap.export(model, batches[0], files["int8"], precision="int8", data=batches)
    assert report.passed
    assert report.precision == "int8"
    assert report.bytes < 0.4 * plain.bytes
    assert report.bytes == files["int8"].stat().st_size
    assert right(files["float32"]) > 0.99
    assert right(files["int8"]) > right(files["float32"]) - 0.01
    found = operators(files["int8"])
    assert found["BatchNormalization"] == 0 and found["QuantizeLinear"] > found["Conv"] > 0
    assert dict(found) == report.operators
    weights = {t.data_type for t in onnx.load(files["int8"]).graph.initializer if len(t.dims) == 4}
    assert weights == {onnx.TensorProto.INT8}
    assert any(p.key == "normswap.version" for p in onnx.load(files["int8"]).metadata_props)
    assert [file.name for file in tmp_path.iterdir() if "quantize" in file.name] == []


def test_int8_takes_a_padding_and_a_normalization(tmp_path):
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(nn.functional.pad(self.conv(x), (1, 1, 1, 1)))

    x = torch.randn(4, 3, 8, 8)
    report = normswap.export(Padded(), x, tmp_path / "m.onnx", precision="int8", data=[x])
    assert report.passed
    assert report.validation.max_rel < 0.1


def test_int8_takes_batches_as_a_loader_gives_them(tmp_path, batches):
    images, labels = digits_data("train")
    pairs = [(images[:32], labels[:32])]
    report = normswap.export(
        digits(), batches[0], tmp_path / "m.onnx", precision="int8", data=pairs
    )
    assert report.passed


def test_float16_halves_the_file_and_keeps_the_predictions(tmp_path, batches):
    model, path = digits(), tmp_path / "m.onnx"
    plain = normswap.export(model, batches[0], path)
    report = normswap.export(model, batches[0], path, precision="float16")
    assert report.passed
    assert report.bytes < 0.6 * plain.bytes
    assert 1e-6 < report.validation.max_rel < 5e-3  # 11 bits, and no more
    types = {tensor.data_type for tensor in onnx.load(path).graph.initializer}
    assert onnx.TensorProto.FLOAT not in types
    assert onnx.load(path).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert right(path) > 0.985


def test_a_file_that_lost_its_function_does_not_pass(tmp_path, batches):
    data = [batches[0], 1e4 * batches[1]]  # one step of these ranges is more than any digit
    report = normswap.export(digits(), batches[0], tmp_path / "m.onnx", precision="int8", data=data)
    assert not report.passed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8"}, "takes the ranges of values from data; give some"),
        ({"precision": "int4"}, "no precision 'int4'; choose one of float32, float16, int8"),
        ({"target": "phone"}, "no target 'phone'; choose one of generic, onnxruntime"),
        (
            {"target": "onnxruntime", "precision": "float16"},
            "is for float32; export float16 for the target 'generic'",
        ),
        ({"precision": "int8", "data": [torch.zeros(2, 5)]}, "does not run on an input of 2x5"),
        ({"precision": "int8", "data": []}, "no batch"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_written(tmp_path, batches, options, message):
    with pytest.raises(NormswapError, match=message) as caught:
        normswap.export(digits(), batches[0], tmp_path / "model.onnx", **options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_height_and_width_are_open_where_the_model_allows(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    )
    path = tmp_path / "model.onnx"
    report = normswap.export(model, torch.randn(1, 3, 16, 16), path, dynamic="size")
    assert report.passed
    assert report.inputs == {"input": ["batch", 3, "height", "width"]}
    assert "larger" in {case.name for case in report.validation.cases}
    x = torch.randn(3, 3, 21, 34)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = model(x).numpy()
    np.testing.assert_allclose(session.run(None, {"input": x.numpy()})[0], expected, atol=1e-5)


def test_a_model_for_one_size_says_so(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 3))
    with pytest.raises(NormswapError, match=r"cannot be left open: .* \(without --dynamic-size"):
        normswap.export(model, torch.randn(2, 3, 8, 8), tmp_path / "m.onnx", dynamic="size")
    assert not list(tmp_path.iterdir())
