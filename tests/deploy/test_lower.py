"""Each rule of `deploy/lower` computes what the graph computed before, and only where it may."""

import math

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import normswap
from normswap.core.errors import NormswapError
from normswap.deploy.lower import group_normalization, lower, square

# Two ways to sum in float32; the largest sums here have some thousand terms.
CLOSE = 2e-5


def exported(model: nn.Module, x: torch.Tensor, path, **options) -> ir.Model:
    normswap.export(model.eval(), x, path, validate=False, **options)
    return ir.load(path)


def run(model: ir.Model, x: torch.Tensor) -> list[np.ndarray]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def assert_same(model: nn.Module, x: torch.Tensor, path, *there: str, **options) -> ir.Model:
    """Lower what `model` exports to; it has the operators `there`, and its outputs stay."""
    graph = exported(model, x, path, **options)
    before = run(graph, x)
    assert lower(graph, "onnxruntime")
    assert set(there) <= set(kinds(graph)), kinds(graph)
    for actual, expected in zip(run(graph, x), before, strict=True):
        assert actual.shape == expected.shape
        np.testing.assert_allclose(
            actual, expected, rtol=CLOSE, atol=CLOSE * np.abs(expected).max()
        )
    return graph


def randomised(norm: nn.Module) -> nn.Module:
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


@st.composite
def group_norms(draw) -> tuple[nn.Module, torch.Tensor]:
    rank = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2, 3, 8, 12]))
    channels = groups * draw(st.integers(1, 4))
    size = [draw(st.integers(2, 7)) for _ in range(rank)]
    epsilon = draw(st.sampled_from([1e-6, 1e-5, 1e-2]))
    norm = nn.GroupNorm(groups, channels, eps=epsilon, affine=draw(st.booleans()))
    torch.manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(draw(st.integers(1, 3)), channels, *size)
    return randomised(norm), x * draw(st.sampled_from([0.1, 1.0, 30.0])) + draw(st.floats(-3, 3))


@settings(max_examples=6, deadline=None)
@given(network=group_norms(), dynamic=st.booleans())
def test_a_group_norm_of_any_shape_is_the_same(tmp_path_factory, network, dynamic):
    norm, x = network
    rank, channels = x.ndim - 2, norm.num_channels
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](channels, 2, 1)
    model = nn.Sequential(norm, conv)
    path = tmp_path_factory.mktemp("lower") / "model.onnx"
    exported(model, x, path, dynamic=dynamic)
    float32 = model(x).detach().numpy()
    expected = model.double()(x.double()).detach().numpy()
    peak = np.abs(expected).max()
    # A variance from sums of squares loses what the mean is larger than the deviation, squared.
    rows = x.double().reshape(len(x), norm.num_groups, -1)
    lost = float((rows.mean(2) ** 2 / (rows.var(2, correction=0) + norm.eps)).max())
    allowed = (CLOSE + 1e-6 * lost) * peak + 20 * np.abs(float32 - expected).max()
    for large in (0, math.inf):
        graph = ir.load(path)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(group_normalization, "LARGE", large)
            patch.setattr(group_normalization, "LARGE_ROW", large)
            lowered = lower(graph, "onnxruntime")
        if norm.num_groups < channels:
            assert lowered == (large == 0 or rank == 2)
        np.testing.assert_allclose(run(graph, x)[0], expected, rtol=0, atol=allowed)


def test_an_instance_norm_of_one_sample_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(group_normalization, "LARGE", 0)
    monkeypatch.setattr(group_normalization, "LARGE_ROW", 0)
    norm = randomised(nn.InstanceNorm2d(9, affine=True))
    x = torch.randn(1, 9, 5, 6) + 1
    assert_same(norm, x, tmp_path / "model.onnx", "FusedMatMul", "Conv", dynamic=False)


@pytest.mark.parametrize("dynamic", [True, False])
def test_an_instance_norm_of_a_batch_stays_one_operator(tmp_path, monkeypatch, dynamic):
    monkeypatch.setattr(group_normalization, "LARGE", 0)
    x = torch.randn(3, 9, 5, 6)
    graph = exported(nn.InstanceNorm2d(9), x, tmp_path / "model.onnx", dynamic=dynamic)
    assert not lower(graph, "onnxruntime")


class Residual(nn.Module):
    """conv, norm, relu, conv, norm, sum, relu: where one operator may merge with the next."""

    def __init__(self, norm) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList([randomised(norm()), randomised(norm())])
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.norms[0](self.first(x)))
        return self.head(torch.relu(x + self.norms[1](self.second(h))))


@pytest.mark.parametrize("large", [0, math.inf])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_residual_block_is_the_same(tmp_path, monkeypatch, large, batch):
    monkeypatch.setattr(group_normalization, "LARGE", large)
    monkeypatch.setattr(group_normalization, "LARGE_ROW", large)
    block = Residual(lambda: nn.GroupNorm(4, 8))
    x = torch.randn(batch, 8, 9, 7)
    graph = assert_same(block, x, tmp_path / "model.onnx", "Conv", dynamic=False)
    depthwise = [node for node in graph.graph if "group" in node.attributes]
    grouped = [node for node in depthwise if node.attributes.get_int("group") == 8]
    assert len(grouped) == (0 if large == 0 and batch > 1 else 2)


def test_an_affine_that_no_convolution_reads_is_left(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), randomised(nn.GroupNorm(4, 8)), nn.ReLU())
    graph = exported(model, torch.randn(2, 3, 6, 6), tmp_path / "m.onnx")
    assert not lower(graph, "onnxruntime")


class Tapped(nn.Module):
    """Returns what stands between the operators of its own affine."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.randn(1, 6, 1, 1)) for _ in range(2))
        self.conv = nn.Conv2d(6, 2, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scaled = x * self.gamma
        return self.conv(scaled + self.beta), scaled


def test_a_value_that_someone_else_reads_stays(tmp_path):
    graph = exported(Tapped(), torch.randn(2, 6, 4, 4), tmp_path / "m.onnx")
    assert not lower(graph, "onnxruntime")


@pytest.mark.parametrize(
    "method",
    ["rms_norm", "filter_response_norm", "batch_instance_norm", "switchable_norm", "evonorm_s0",
     "evonorm_b0", "global_response_norm"],
)  # fmt: skip
def test_methods_built_on_moments_are_the_same(tmp_path, monkeypatch, method):
    monkeypatch.setattr(square, "LARGE", 0)
    norm = randomised(normswap.create(method, 16))
    x = torch.randn(2, 16, 7, 5) + 0.5
    graph = assert_same(norm, x, tmp_path / "model.onnx", "FusedMatMul")
    powers = [node for node in graph.graph if node.op_type == "Pow"]
    # What is left are statistics of statistics, over the channels of a table (N, C).
    assert all(len(node.inputs[0].shape) < 4 or node.inputs[0].shape[2] == 1 for node in powers)


@pytest.mark.parametrize("value", [0.0, 1.0, 1000.0])
def test_a_constant_input_has_no_variance_and_no_nan(tmp_path, monkeypatch, value):
    monkeypatch.setattr(group_normalization, "LARGE", 0)
    monkeypatch.setattr(group_normalization, "LARGE_ROW", 0)
    graph = exported(nn.GroupNorm(4, 8), torch.randn(1, 8, 16, 16), tmp_path / "model.onnx")
    lower(graph, "onnxruntime")
    (y,) = run(graph, torch.full((1, 8, 16, 16), value))
    assert np.isfinite(y).all()


BLANK = {
    "one group": lambda: nn.GroupNorm(1, 8),
    "InstanceNorm": lambda: randomised(nn.InstanceNorm2d(8, affine=True)),
    "groups": lambda: nn.Sequential(nn.Conv2d(8, 8, 1), randomised(nn.GroupNorm(2, 8))),
}


@pytest.mark.parametrize(
    "options",
    [
        {"dynamic": False},
        {"dynamic": "size"},
        {"dynamic": True, "target": "onnxruntime"},
        {"dynamic": False, "target": "onnxruntime"},
        {"opset": 16},
    ],
)
@pytest.mark.parametrize("layer", BLANK)
def test_a_blank_image_is_what_torch_makes_of_it(layer, options, tmp_path, monkeypatch):
    monkeypatch.setattr(group_normalization, "LARGE", 100_000)
    monkeypatch.setattr(group_normalization, "LARGE_ROW", 100_000)
    model = BLANK[layer]().eval()
    x = torch.full((1, 8, 120, 120), 2.1)
    report = normswap.export(model, torch.randn_like(x), tmp_path / "m.onnx", **options)
    assert report.passed, report
    (y,) = run(ir.load(tmp_path / "m.onnx"), x)
    expected = model.double()(x.double()).detach().numpy()
    # A rounding of 2.1 is 2.4e-7, and 1 / sqrt(eps) is 316.
    gain = max([1.0, *(float(p.detach().abs().max()) for p in model.parameters())])
    np.testing.assert_allclose(y, expected, rtol=0, atol=32 * 2.4e-7 * 316 * gain)


def test_an_rms_norm_is_what_the_runtime_fuses(tmp_path):
    norm, x = randomised(nn.RMSNorm(16, eps=1e-6)), torch.randn(2, 5, 16)
    assert normswap.export(norm, x, tmp_path / "m.onnx", opset=20).passed
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    onnxruntime.InferenceSession(
        str(tmp_path / "m.onnx"), options, providers=["CPUExecutionProvider"]
    )
    fused = onnx.load(tmp_path / "fused.onnx").graph.node
    assert [node.op_type for node in fused] == ["SimplifiedLayerNormalization"]


def test_short_rows_stay_one_operator(tmp_path):
    graph = exported(nn.InstanceNorm2d(4), torch.randn(2, 4, 9, 9), tmp_path / "m.onnx")
    assert kinds(graph) == ["InstanceNormalization"]


def test_a_mean_of_many_deviations_costs_digits_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(group_normalization, "LARGE", 0)
    monkeypatch.setattr(group_normalization, "LARGE_ROW", 0)
    norm, x = nn.GroupNorm(4, 8), torch.randn(1, 8, 16, 16) + 30
    graph = exported(norm, x, tmp_path / "model.onnx")
    lower(graph, "onnxruntime")
    expected = norm.double()(x.double()).detach().numpy()
    # float32 rounds the sum of squares by 1e-7 of 1 + 30^2, some times over.
    np.testing.assert_allclose(run(graph, x)[0], expected, atol=1e-3)


@pytest.mark.parametrize("size", ["float64", "float16", "unknown"])
def test_what_the_rules_do_not_know_is_left(tmp_path, monkeypatch, size):
    monkeypatch.setattr(group_normalization, "LARGE", 0)
    monkeypatch.setattr(group_normalization, "LARGE_ROW", 0)
    model, x = nn.GroupNorm(4, 8), torch.randn(2, 8, 6, 6)
    if size != "unknown":
        model, x = model.to(getattr(torch, size)), x.to(getattr(torch, size))
    dynamic = "size" if size == "unknown" else True
    graph = exported(model, x, tmp_path / "model.onnx", dynamic=dynamic)
    assert not lower(graph, "onnxruntime")


def test_the_generic_target_has_standard_operators_alone(tmp_path):
    model, x = Residual(lambda: nn.GroupNorm(4, 8)), torch.randn(1, 8, 200, 200)
    files = {target: tmp_path / f"{target}.onnx" for target in ("generic", "onnxruntime")}
    for target, path in files.items():
        assert normswap.export(model, x, path, target=target).passed
    domains = {t: {node.domain for node in onnx.load(p).graph.node} for t, p in files.items()}
    assert domains == {"generic": {""}, "onnxruntime": {"", "com.microsoft"}}


def test_a_lowered_layer_keeps_its_place_in_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(group_normalization, "LARGE", 0)
    monkeypatch.setattr(group_normalization, "LARGE_ROW", 0)
    block, x = Residual(lambda: nn.GroupNorm(4, 8)), torch.randn(2, 8, 6, 6)
    path = tmp_path / "model.onnx"
    normswap.export(block, x, path, target="onnxruntime")
    file = onnx.load(path)
    gains = [t for t in file.graph.initializer if t.name.startswith("group_norm_1_group_constant")]
    wrong = next(t for t in gains if list(t.dims) == [1, 4, 2, 1])
    wrong.CopyFrom(onnx.numpy_helper.from_array(np.ones((1, 4, 2, 1), np.float32), wrong.name))
    onnx.save(file, path)
    report = normswap.validate(path, block, x)
    assert not report.passed
    assert report.first_divergence.startswith("norms.1 ")


def test_an_older_opset_is_refused(tmp_path):
    with pytest.raises(NormswapError, match="opset 18 or newer"):
        exported(
            nn.GroupNorm(2, 4), torch.randn(2, 4, 3, 3), tmp_path / "m.onnx",
            opset=17, target="onnxruntime",
        )  # fmt: skip
    assert not list(tmp_path.iterdir())
