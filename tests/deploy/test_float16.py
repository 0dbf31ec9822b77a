"""A float16 file is run as a device in float16 runs it: what overflows there fails here."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

import normswap
from normswap.deploy.diverge import all_values, open_faithful, open_session

LARGEST = float(np.finfo(np.float16).max)
LARGE = 3e4  # below the largest float16, and its square is not


def scaled(model: nn.Sequential, x: torch.Tensor, reach: float) -> nn.Sequential:
    """`model` with a first layer that reaches so far on `x`, and with statistics of that."""
    with torch.no_grad():
        factor = reach / model[0](x).abs().max()
        model[0].weight *= factor
        model[0].bias *= factor
        for _ in range(60):
            model.train()(x)
    return model.eval()


def convolutions(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm, nn.Conv2d(8, 4, 3, padding=1))


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(4, 3, 8, 8)


def test_a_convolution_that_overflows_fails_and_rescale_mends_it(tmp_path, x):
    model, path = scaled(convolutions(nn.GroupNorm(4, 8)), x, 82_366), tmp_path / "m.onnx"
    report = normswap.export(model, x, path, precision="float16")
    assert not report.passed
    (line,) = report.validation.overflows
    assert line == "0 (node 'node_conv2d', Conv, reads 0.weight, 0.bias) reaches 82,366"
    assert report.validation.first_divergence == line
    assert "float16 ends at 65,504; normswap.rescale" in str(report)
    outputs = ReferenceEvaluator(str(path)).run(None, {"input": x.numpy()})
    assert np.isnan(outputs[0]).all()  # by evaluation that is not ours

    mended = normswap.export(normswap.rescale(model, x, [x]), x, path, precision="float16")
    assert mended.passed and mended.validation.overflows == ()
    outputs = ReferenceEvaluator(str(path)).run(None, {"input": x.numpy()})
    assert np.isfinite(outputs[0]).all()


def test_what_is_validated_from_the_file_alone_is_run_so_too(tmp_path, x):
    model, path = scaled(convolutions(nn.GroupNorm(4, 8)), x, 82_366), tmp_path / "m.onnx"
    normswap.export(model, x, path, precision="float16", validate=False)
    assert normswap.validate(path, model, x, rtol=0.02).overflows


# DynamicTanh saturates, and so makes of such an input its sign, in any type.
LARGE_INPUTS = [
    name
    for name, method in normswap.methods().items()
    if method.kind == "activation" and not method.onnx and name != "dynamic_tanh"
]


@pytest.mark.parametrize("name", LARGE_INPUTS)
def test_every_normalization_takes_large_values(tmp_path, x, name):
    torch.manual_seed(0)
    model = scaled(convolutions(normswap.create(name, 8)), x, LARGE)
    report = normswap.export(model, x, tmp_path / "m.onnx", precision="float16")
    assert report.passed, str(report)


class OwnRMSNorm(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Written(nn.Module):
    """Normalizations of which no module is one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        by_torch = F.rms_norm(x, (8,)) + F.layer_norm(x, (8,))
        apart = x - x.mean(-1, keepdim=True)
        return self.last(by_torch + apart / torch.sqrt((apart * apart).mean(-1, keepdim=True)))


@pytest.mark.parametrize("opset", [18, 20, 23])
@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8), nn.Linear(8, 4)),
        nn.Sequential(nn.Linear(8, 8), OwnRMSNorm(), nn.Linear(8, 4)),
        nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), OwnRMSNorm()),
        Written(),
    ],
    ids=["RMSNorm", "own", "last", "written out"],
)
def test_a_normalization_that_is_decomposed_takes_large_values(tmp_path, model, opset):
    torch.manual_seed(0)
    first, x = next(iter(model.children())), torch.randn(4, 8)
    with torch.no_grad():
        nn.init.normal_(first.weight)
        first.weight *= LARGE / first(x).abs().max()
    report = normswap.export(model, x, tmp_path / "m.onnx", precision="float16", opset=opset)
    assert report.passed, str(report)


def test_two_normalizations_of_one_value_are_kept(tmp_path):
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.RMSNorm(8), OwnRMSNorm()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(x)
            return self.a(x) - 2 * self.b(x)

    x = LARGE * torch.randn(4, 8).sign() * torch.rand(4, 8)
    assert normswap.export(Both(), x, tmp_path / "m.onnx", precision="float16").passed


# --- the evaluator --------------------------------------------------------------------------------

ONE = {"Relu": 1, "Sigmoid": 1, "Add": 2, "Sub": 2, "Mul": 2, "Conv": 2, "MaxPool": 1, "Neg": 1}
KERNEL = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}


def graph(operators: list[tuple[str, int, int]]) -> onnx.ModelProto:
    """A file of float16 in which each operator takes two of the values before it."""
    rng, names, nodes = np.random.default_rng(0), ["x"], []
    weight = numpy_helper.from_array(rng.normal(size=(4, 4, 3, 3)).astype(np.float16), "weight")
    for index, (kind, a, b) in enumerate(operators):
        read = [names[a % len(names)], names[b % len(names)]][: ONE[kind]]
        read = [read[0], "weight"] if kind == "Conv" else read
        options = KERNEL if kind in ("Conv", "MaxPool") else {}
        names.append(f"value{index}")
        nodes.append(helper.make_node(kind, read, [names[-1]], name=f"node{index}", **options))
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, [2, 4, 6, 6]) for name in names
    ]
    made = helper.make_graph(nodes, "g", values[:1], values[-1:], [weight], value_info=values[1:-1])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


operators = st.lists(
    st.tuples(st.sampled_from(sorted(ONE)), st.integers(0, 9), st.integers(0, 9)),
    min_size=1,
    max_size=12,
)


@given(operators=operators, size=st.sampled_from([1e-6, 1.0, 100.0, 3e4]))
@settings(max_examples=60, deadline=None)
def test_each_operator_makes_of_its_inputs_what_the_reference_evaluator_makes(operators, size):
    model = graph(operators)
    x = (size * np.random.default_rng(1).normal(size=(2, 4, 6, 6))).clip(-6e4, 6e4)
    feed = {"x": x.astype(np.float16)}
    values = feed | all_values(onnx.ModelProto.FromString(model.SerializeToString()), Path(), feed)
    values |= {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        read, actual = {name: values[name] for name in node.input}, values[node.output[0]]
        assert actual.dtype == np.float16
        largest = np.abs(read[node.input[0]].astype(float)).max()
        # The evaluator of onnx sums the products of a convolution in float16.
        rounding = 2**-7 * largest if node.op_type == "Conv" else 0.0
        if not all(np.isfinite(each).all() for each in read.values()) or rounding > 8:
            continue
        with np.errstate(all="ignore"):
            (expected,) = ReferenceEvaluator(node).run(None, read)
        found, wanted = (np.clip(v.astype(float), -LARGEST, LARGEST) for v in (actual, expected))
        np.testing.assert_allclose(found, wanted, rtol=2**-9, atol=rounding + 2**-23)


def test_each_operator_gives_the_digits_that_it_gives_in_a_file_of_its_own(tmp_path, x):
    """ONNX Runtime takes casts out between operators, in which it would be off by a rounding."""
    path = tmp_path / "m.onnx"
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    )
    normswap.export(model, x, path, precision="float16", validate=False)
    proto = onnx.load(path)
    half = x.numpy().astype(np.float16)
    for node in proto.graph.node[1:-1]:
        weights = [t for t in proto.graph.initializer if t.name in node.input]
        (value,) = [name for name in node.input if name not in {t.name for t in weights}]
        kinds = [onnx.ValueInfoProto(name=name) for name in (value, *node.output)]
        for kind in kinds:
            kind.type.tensor_type.elem_type = TensorProto.FLOAT16
        alone = helper.make_graph([node], "one", kinds[:1], kinds[1:], weights)
        one = helper.make_model(alone, opset_imports=proto.opset_import, ir_version=10)
        session = open_session(one.SerializeToString(), tmp_path, optimized=False)
        (half,) = session.run(None, {value: half})
    (output,) = open_faithful(path).run(None, {proto.graph.input[0].name: x.numpy()})
    assert np.array_equal(output, half.astype(np.float32))
