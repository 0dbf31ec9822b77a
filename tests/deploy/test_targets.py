"""A file for a runtime that cannot run here has what the runtime documents, and is the model."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import normswap
from normswap.core.errors import NormswapError

# Of what each documents, what networks like these consist of. TensorRT, whose GroupNormalization is
# that of opset 18 (https://github.com/NVIDIA/TensorRT/issues/4336):
# https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md. Core ML, as MLProgram:
# https://onnxruntime.ai/docs/execution-providers/CoreML-ExecutionProvider.html. QNN:
# https://github.com/onnxruntime/onnxruntime-qnn/blob/main/docs/execution_providers/QNN-ExecutionProvider.md
COMMON = {"Add", "Conv", "Div", "Gemm", "InstanceNormalization", "LayerNormalization", "MatMul"}
COMMON |= {"Concat", "Max", "Mul", "Pow", "ReduceMean", "Relu", "Reshape", "Shape", "Sqrt", "Sub"}
DOCUMENTED = {
    "tensorrt": COMMON | {"Cast", "Expand", "Reciprocal", "RMSNormalization"},
    "coreml": COMMON | {"GroupNormalization"},
    "qnn": COMMON | {"Expand", "GroupNormalization", "Reciprocal", "RMSNormalization"},
}


def images(norm: nn.Module) -> tuple[nn.Module, torch.Tensor]:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 4, 1))
    return model, torch.randn(2, 3, 40, 40)


def tokens(norm: nn.Module) -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Linear(16, 16), norm, nn.Linear(16, 4)), torch.randn(2, 6, 16)


LAYERS = {
    "GroupNorm": lambda: images(nn.GroupNorm(2, 8)),
    "GroupNorm, short rows": lambda: images(nn.GroupNorm(8, 8)),
    "InstanceNorm": lambda: images(nn.InstanceNorm2d(8, affine=True)),
    "LayerNorm": lambda: tokens(nn.LayerNorm(16)),
    "RMSNorm": lambda: tokens(nn.RMSNorm(16)),
    "filter_response_norm": lambda: images(normswap.create("filter_response_norm", 8)),
}


def nodes(path) -> list[onnx.NodeProto]:
    return list(onnx.load(path).graph.node)


@pytest.mark.parametrize("opset", [18, None, 23])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("target", DOCUMENTED)
def test_a_file_has_the_operators_that_its_runtime_documents(tmp_path, target, layer, opset):
    model, x = LAYERS[layer]()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    path, options = tmp_path / "m.onnx", {"target": target, "dynamic": target == "tensorrt"}
    if (target, layer, opset) == ("coreml", "RMSNorm", 23):
        opset = 22
    report = normswap.export(model, x, path, opset=opset, **options)
    assert report.passed, report
    assert {node.domain for node in nodes(path)} == {""}
    assert {node.op_type for node in nodes(path)} <= DOCUMENTED[target]


EXCLUDED = {
    "tensorrt": (nn.GroupNorm(2, 8), (2, 8, 4, 4), "GroupNormalization of opset 21; export with"),
    "coreml": (
        nn.RMSNorm(8),
        (2, 8),
        "RMSNormalization of opset 23; export with opset 22 or older",
    ),
}


@pytest.mark.parametrize("target", EXCLUDED)
def test_an_operator_that_the_runtime_does_not_take_is_refused(tmp_path, target):
    norm, shape, message = EXCLUDED[target]
    half = torch.float16 if target == "tensorrt" else torch.float32  # which no rule rewrites
    with pytest.raises(NormswapError, match=message):
        normswap.export(
            norm.to(half), torch.randn(shape).to(half), tmp_path / "m.onnx",
            target=target, opset=23, validate=False,
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dynamic", [True, False, "size"])
def test_a_group_norm_of_opset_21_is_that_of_older_ones(tmp_path, dynamic):
    """As the operator, ONNX Runtime computes E[x^2] - E[x]^2."""
    norm, x = nn.GroupNorm(8, 8).eval(), torch.full((2, 8, 40, 40), 2.1)
    report = normswap.export(
        norm, torch.randn_like(x), tmp_path / "m.onnx", opset=21, dynamic=dynamic
    )
    assert report.passed, report
    assert "GroupNormalization" not in report.operators
    session = onnxruntime.InferenceSession(
        str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"]
    )
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = norm.double()(x.double()).detach().numpy()
    # A rounding of 2.1 is 2.4e-7, and 1 / sqrt(eps) is 316.
    np.testing.assert_allclose(y, expected, rtol=0, atol=32 * 2.4e-7 * 316)


def test_coreml_takes_gains_that_are_initializers(tmp_path):
    model, x = images(nn.GroupNorm(2, 8))
    normswap.export(model, x, tmp_path / "m.onnx", target="coreml")
    graph = onnx.load(tmp_path / "m.onnx").graph
    (norm,) = (node for node in graph.node if node.op_type == "LayerNormalization")
    assert norm.input[1] in {tensor.name for tensor in graph.initializer}


class Standardized(nn.Module):
    """The formula of a normalization, with the inverse of its deviation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rest = x - x.mean((2, 3), keepdim=True)
        return rest * (rest.square().mean((2, 3), keepdim=True) + 1e-6).sqrt().reciprocal()


def test_coreml_inverts_a_small_deviation_by_a_quotient(tmp_path):
    path, x = tmp_path / "m.onnx", 1e-2 * torch.randn(2, 3, 8, 8)
    normswap.export(Standardized(), x, path)
    assert "Reciprocal" in {node.op_type for node in nodes(path)}
    report = normswap.export(Standardized(), x, path, target="coreml")
    assert report.passed, report
    assert "Reciprocal" not in report.operators


def test_tensorrt_takes_float16(tmp_path):
    model, x = images(nn.GroupNorm(2, 8))
    report = normswap.export(model, x, tmp_path / "m.onnx", target="tensorrt", precision="float16")
    assert report.passed
    assert set(report.operators) <= DOCUMENTED["tensorrt"]
    with pytest.raises(NormswapError, match="is for float32 and float16; export int8 for"):
        normswap.export(model, x, tmp_path / "m.onnx", target="tensorrt", precision="int8")


def test_qnn_takes_fixed_sizes(tmp_path, run):
    model, x = images(nn.GroupNorm(2, 8))
    with pytest.raises(NormswapError, match=r"no file that leaves a size open.*--static"):
        normswap.export(model, x, tmp_path / "m.onnx", target="qnn")
    assert not list(tmp_path.iterdir())
    out = str(tmp_path / "folded")
    assert run("fold", "demo:digits", "--onnx", "--target", "qnn", "--out", out)[0] == 0
    (image,) = onnx.load(tmp_path / "folded" / "model.onnx").graph.input
    assert all(size.HasField("dim_value") for size in image.type.tensor_type.shape.dim)
