"""A file in fewer bits gives nearly what the model gives; its size may be left open."""

import subprocess
import sys
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
from normswap.deploy.agreement import Agreements


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


@pytest.mark.parametrize("method", ["filter_response_norm", "evonorm_s0", "rms_norm"])
def test_int8_leaves_the_inside_of_every_normalization_in_float(tmp_path, method):
    """On faint images their mean squares would be one or two steps of 8 bits."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), normswap.create(method, 16), nn.Conv2d(16, 4, 3))
    ).eval()
    bright = torch.randn(16, 3, 12, 12)
    data = [torch.cat([bright[:8], 0.1 * bright[8:]])]
    path = tmp_path / "m.onnx"
    report = normswap.export(model, data[0], path, precision="int8", data=data)
    assert report.passed
    inside = [
        node
        for node in onnx.load(path).graph.node
        if node.op_type in ("Pow", "ReduceMean", "Sqrt", "Reciprocal")
    ]
    quantized = {
        name
        for node in onnx.load(path).graph.node
        if node.op_type == "DequantizeLinear"
        for name in node.output
    }
    assert inside and all(quantized.isdisjoint(node.input[:1]) for node in inside[1:])
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    faint = data[0][8:]
    (given,) = session.run(None, {session.get_inputs()[0].name: faint.numpy()})
    with torch.no_grad():
        expected = model(faint).numpy()
    assert np.abs(given - expected).max() < 0.25 * np.abs(expected).max()


def test_agreement_with_the_model_is_measured_on_the_data(tmp_path, batches):
    model = digits()
    path = tmp_path / "m.onnx"
    report = normswap.export(model, batches[0], path, precision="int8", data=iter(batches))
    (agreement,) = report.validation.agreement
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    images = torch.cat(batches)
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        same = (logits.argmax(1) == model(images).argmax(1).numpy()).mean()
    assert agreement.share == pytest.approx(same)
    assert agreement.samples == len(images) == 256
    assert f"same class for {same:.2%} of 256 samples" in str(report)


def test_outputs_that_are_no_classes_are_held_to_their_variance(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1)).eval(), torch.randn(8, 3, 8, 8)
    path = tmp_path / "m.onnx"
    good = normswap.export(model, x, path, precision="int8", data=[x])
    assert good.passed and 0 < good.validation.agreement[0].error < 0.01
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        told = model(x).double().numpy()
    spread = told.var(axis=(0, 2, 3), keepdims=True)
    error = ((given - told) ** 2 / spread).mean()
    assert good.validation.agreement[0].error == pytest.approx(error, rel=1e-3)


def test_an_error_of_more_than_a_tenth_of_the_variance_does_not_pass():
    model, x = nn.Identity(), torch.randn(64, 3, 8, 8)
    for size, passes in ((0.3, True), (0.34, False)):
        gathered = Agreements(model, [x])
        gathered.add(x + size * torch.randn_like(x).sign(), x, len(x))
        (found,) = gathered.found()
        assert found.error == pytest.approx(size**2, rel=0.05)
        assert found.passed is passes


def test_float16_is_checked_on_the_data(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)).eval(), torch.randn(2, 3, 8, 8)
    path = tmp_path / "m.onnx"
    assert normswap.export(model, x, path, precision="float16", data=[x]).passed
    report = normswap.export(model, x, path, precision="float16", data=[x, 5e4 * x])
    assert not report.passed
    assert report.validation.overflows


class Encoder(nn.Module):
    """A small transformer of two inputs, tokens and a number that shifts them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, tokens: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.embed(tokens) + shift)


@pytest.mark.parametrize(("bits", "size", "error"), [(8, 0.6, 1e-3), (4, 0.5, 0.05)])
def test_weights_alone_are_quantized(tmp_path, bits, size, error):
    torch.manual_seed(0)
    model, path = Encoder().eval(), tmp_path / "m.onnx"
    inputs = torch.randint(50, (4, 12)), torch.randn(4, 1, 1)
    plain = normswap.export(model, inputs, path)
    report = normswap.export(model, inputs, path, precision=f"int{bits}_weight_only")
    assert report.passed
    assert report.operators["MatMulNBits"] >= 4
    assert report.bytes < size * plain.bytes
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {e.name: v.numpy() for e, v in zip(session.get_inputs(), inputs, strict=True)}
    with torch.no_grad():
        expected = model(*inputs).numpy()
    off = ((session.run(None, feed)[0] - expected) ** 2 / expected.var((0, 1))).mean()
    assert 0 < off < error
    assert report.validation.agreement[0].error == pytest.approx(off, rel=0.1)


def test_a_model_without_matrix_products_keeps_its_weights_and_says_so(tmp_path):
    with pytest.raises(NormswapError, match="no MatMul with a constant weight"):
        normswap.export(
            nn.Conv2d(3, 4, 3),
            torch.randn(2, 3, 8, 8),
            tmp_path / "m.onnx",
            precision="int4_weight_only",
        )
    assert not list(tmp_path.iterdir())


def test_an_export_leaves_the_logging_of_the_application_as_it_is():
    code = """if True:
        import logging, normswap.deploy.precision
        assert "onnxruntime.quantization.matmul_nbits_quantizer" in __import__("sys").modules
        assert not logging.root.handlers and logging.root.level == logging.WARNING
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
