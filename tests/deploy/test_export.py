"""Exported files hold the model, and a failed export leaves everything as it was."""

import copy
import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils import _pytree

from normswap.core.errors import NormswapError
from normswap.deploy import export as export_module
from normswap.deploy.export import export


def run(path, *tensors):
    """The file's outputs, by ONNX Runtime directly."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return session.run(None, {n: t.numpy() for n, t in zip(names, tensors, strict=True)})


def assert_same(path, model, *tensors, kwargs=None, rtol=1e-4, atol=1e-5):
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        wanted = _pytree.tree_leaves(model(*tensors, **(kwargs or {})))
    feed = _pytree.tree_leaves((tensors, kwargs or {}))
    for actual, expected in zip(run(path, *feed), wanted, strict=True):
        np.testing.assert_allclose(actual, expected.numpy(), rtol=rtol, atol=atol)


NORMS = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "LayerNorm": lambda: nn.LayerNorm([4, 6, 6]),
    "RMSNorm": lambda: nn.RMSNorm([4, 6, 6]),
}


@pytest.mark.parametrize("norm", NORMS)
def test_any_normalization_computes_the_same_at_any_batch_size(norm, tmp_path):
    head = nn.Sequential(nn.Flatten(), nn.Linear(144, 5), nn.BatchNorm1d(5))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), NORMS[norm](), nn.ReLU(), *head)
    model(torch.randn(8, 3, 8, 8))  # statistics other than 0 and 1
    report = export(model, torch.randn(1, 3, 8, 8), tmp_path / "m.onnx")
    assert report.passed
    for batch in (1, 2, 5):
        assert_same(tmp_path / "m.onnx", model, torch.randn(batch, 3, 8, 8))


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    batch=st.integers(1, 4),
    per_group=st.integers(1, 3),
    groups=st.integers(1, 4),
    bias=st.booleans(),
)
def test_group_norm_of_any_grouping_is_exported(batch, per_group, groups, bias, tmp_path):
    channels = per_group * groups
    model = nn.Sequential(nn.Conv2d(2, channels, 3, bias=bias), nn.GroupNorm(groups, channels))
    assert export(model, torch.randn(batch, 2, 5, 5), tmp_path / "m.onnx").passed
    assert_same(tmp_path / "m.onnx", model, torch.randn(batch + 1, 2, 5, 5))


def test_the_report_describes_the_file(net, images, tmp_path):
    report = export(net, images, tmp_path / "m.onnx", opset=21)
    proto = onnx.load(tmp_path / "m.onnx")
    assert report.path == tmp_path / "m.onnx"
    assert report.bytes == (tmp_path / "m.onnx").stat().st_size
    assert report.opset == proto.opset_import[0].version == 21
    assert report.inputs == {"x": ["batch", 3, 8, 8]}
    assert list(report.outputs) == [output.name for output in proto.graph.output]
    assert sum(report.operators.values()) == len(proto.graph.node)
    assert report.operators["Conv"] == 3
    assert str(tmp_path / "m.onnx") in str(report) and "validation passed" in str(report)
    assert [case.shapes[0][0] for case in report.validation.cases][:4] == [2, 3, 1, 2]


def test_the_model_is_as_it_was_even_when_the_export_fails(net, images, tmp_path):
    net.train()
    net.layers[0].eval()
    net.fc.weight.requires_grad_(False)
    net.bn.register_forward_hook(lambda module, args, output: output)
    state = copy.deepcopy(net.state_dict())
    modes = [module.training for module in net.modules()]
    hooks = [len(module._forward_hooks) for module in net.modules()]
    random = torch.get_rng_state()
    export(net, images, tmp_path / "m.onnx")
    with pytest.raises(NormswapError):
        export(net, images[:, :2], tmp_path / "m.onnx")
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in net.modules()] == modes
    assert [len(module._forward_hooks) for module in net.modules()] == hooks
    assert not net.fc.weight.requires_grad and net.stem.weight.requires_grad
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert all(parameter.grad is None for parameter in net.parameters())


def test_parametrizations_are_baked_in_the_file_and_kept_in_the_model(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    for conv in (model[0], model[2]):
        parametrizations.weight_norm(conv)
        nn.init.uniform_(conv.parametrizations.weight.original0, 0.5, 2)
    report = export(model, torch.randn(2, 3, 8, 8), tmp_path / "m.onnx")
    assert set(report.operators) == {"Conv", "Relu"}
    names = {tensor.name for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert names == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert hasattr(model[0], "parametrizations")
    assert_same(tmp_path / "m.onnx", model, torch.randn(3, 3, 8, 8))


def test_tied_weights_are_stored_once(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model[2].weight = model[0].weight
    report = export(model, torch.randn(2, 64), tmp_path / "m.onnx")
    one = model[0].weight.nbytes
    assert one < report.bytes < 1.9 * one
    assert_same(tmp_path / "m.onnx", model, torch.randn(3, 64))


class Many(nn.Module):
    def forward(self, x, unused, pair, *, scale=1.0, shift=None):
        y = x * scale + pair["b"] - 2 * pair["a"][0]
        return {"y": y if shift is None else y + shift, "parts": (x.mean(1), y)}


def test_nested_positional_keyword_and_unused_inputs_reach_the_file_in_order(tmp_path):
    x, unused, a, b, shift = (torch.randn(2, 3) for _ in range(5))
    inputs = {"shift": shift, "pair": {"b": b, "a": [a]}, "scale": 3.0, "unused": unused, "x": x}
    report = export(Many(), inputs, tmp_path / "m.onnx")
    assert report.passed and len(report.inputs) == 5 and len(report.outputs) == 3
    assert report.dynamic and all(isinstance(shape[0], str) for shape in report.inputs.values())
    tensors = [t[[0, 1, 0]] for t in (x, unused, b, a, shift)]
    outputs = run(tmp_path / "m.onnx", *tensors)
    wanted = tensors[0] * 3 + tensors[2] - 2 * tensors[3] + tensors[4]
    np.testing.assert_allclose(outputs[0], wanted.numpy(), rtol=1e-5, atol=1e-6)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x, scale):
        return self.norm(x) * scale


def test_a_tensor_of_another_size_does_not_share_the_batch(tmp_path):
    model, x, scale = TwoInputs(), torch.randn(2, 4), torch.randn(4)
    report = export(model, (x, scale), tmp_path / "m.onnx")
    assert report.inputs == {"x": ["batch", 4], "scale": [4]}
    assert_same(tmp_path / "m.onnx", model, torch.randn(7, 4), scale)


def test_a_static_file_has_the_given_batch_size(net, images, tmp_path):
    report = export(net, images[:1], tmp_path / "m.onnx", dynamic=False)
    assert report.inputs == {"x": [1, 3, 8, 8]} and not report.dynamic
    assert [case.name for case in report.validation.cases][:2] == ["given", "random"]
    assert all(case.shapes == [[1, 3, 8, 8]] for case in report.validation.cases)


class Loop(nn.Module):
    def forward(self, x):
        return torch.stack([x[i] * 2 for i in range(x.shape[0])])


def test_a_batch_size_fixed_by_the_code_asks_for_a_static_export(images, tmp_path):
    with pytest.raises(NormswapError, match=r"fixes the batch size.*--static"):
        export(Loop(), images, tmp_path / "m.onnx")
    assert export(Loop(), images, tmp_path / "m.onnx", dynamic=False).passed


@pytest.mark.parametrize("opset", [17, 18, 23])
def test_the_requested_opset_is_written(opset, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    report = export(model, torch.randn(2, 3, 8, 8), tmp_path / "m.onnx", opset=opset)
    assert report.passed
    assert onnx.load(tmp_path / "m.onnx").opset_import[0].version == opset
    assert_same(tmp_path / "m.onnx", model, torch.randn(3, 3, 8, 8))


@pytest.mark.parametrize(
    ("opset", "why"),
    [
        (-1, "opset -1 is not supported"),
        (3, "opset 3 is not supported"),
        (9, "this model has operators without a form in opset 9"),
        (99, "opset 99 is not supported"),
    ],
)
def test_an_impossible_opset_lists_the_possible_ones(opset, why, images, tmp_path):
    with pytest.raises(NormswapError, match=f"^{why}; use 18 to 23"):
        export(nn.ReLU(), images, tmp_path / "m.onnx", opset=opset)
    assert list(tmp_path.iterdir()) == []


def test_large_weights_lie_beside_the_file_and_are_loaded(net, images, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "EXTERNAL_DATA_BYTES", 100)
    report = export(net, images, tmp_path / "out" / "m.onnx")
    files = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert files == ["m.onnx", "m.onnx.data"]
    assert report.passed
    assert report.bytes == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert_same(tmp_path / "out" / "m.onnx", net, images)


class Recipe(BaseModel):
    method: str = "group_norm"


def test_the_recipe_travels_in_the_metadata(net, images, tmp_path):
    net._normswap_recipe = Recipe()
    export(net, images, tmp_path / "m.onnx", validate=False)
    props = {p.key: p.value for p in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert Recipe.model_validate_json(props["normswap.recipe"]) == Recipe()
    assert props["normswap.version"]


def test_the_file_tells_nothing_of_the_machine_it_was_made_on(net, images, tmp_path):
    export(net, images, tmp_path / "m.onnx", validate=False)
    content = (tmp_path / "m.onnx").read_bytes()
    assert str(Path(__file__).parent).encode() not in content
    assert str(Path(torch.__file__).parent).encode() not in content


@pytest.mark.parametrize("where", ["torch.onnx.export", "onnx.checker.check_model"])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_export_leaves_the_previous_file(where, stop, images, tmp_path, monkeypatch):
    (tmp_path / "m.onnx").write_bytes(b"previous")

    def interrupt(*args, **kwargs):
        raise stop

    monkeypatch.setattr(where, interrupt)
    with pytest.raises((stop, NormswapError)):
        export(nn.ReLU(), images, tmp_path / "m.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_bytes() == b"previous"


class Traitor(nn.Module):
    def forward(self, x):
        return x + 1 if torch.compiler.is_exporting() else x


def test_a_file_that_fails_validation_is_written_and_reported(images, tmp_path):
    report = export(Traitor(), images, tmp_path / "m.onnx")
    assert not report.passed and not report.validation.passed
    assert report.validation.max_abs == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(run(tmp_path / "m.onnx", images)[0], images.numpy() + 1, rtol=1e-6)
    assert export(Traitor(), images, tmp_path / "m.onnx", validate=False).passed


def test_nothing_is_printed_logged_or_warned(net, images, tmp_path, capfd, recwarn, caplog):
    export(net, images, tmp_path / "m.onnx", opset=21)
    with pytest.raises(NormswapError):
        export(Branch(), images, tmp_path / "m.onnx")
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    assert not [record for record in caplog.records if record.levelno >= logging.INFO]


class Branch(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Svd(nn.Module):
    def forward(self, x):
        return torch.linalg.svd(x)[1]


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


class OtherDropout(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5, training=True)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Svd(), "operator aten._linalg_svd has no ONNX form"),
        (Branch(), "control flow depends on tensor values"),
        (Noisy(), "random in eval mode.*RandomNormalLike"),
        (OtherDropout(), "random in eval mode.*Dropout"),
        (nn.Conv2d(4, 4, 3), "does not run on an input of 2x3x8x8"),
        (nn.LazyConv2d(4, 3), "lazy"),
        (nn.Bilinear(3, 3, 3), "missing a required argument: 'input2'"),
    ],
)
def test_a_model_that_cannot_be_exported_is_refused_in_one_line(model, message, images, tmp_path):
    with pytest.raises(NormswapError, match=message) as caught:
        export(model, images, tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_model_is_refused(images, tmp_path):
    with pytest.raises(NormswapError, match="scripted"):
        export(torch.jit.script(nn.ReLU()), images, tmp_path / "m.onnx")


def test_inputs_without_a_batch_are_refused_unless_static(tmp_path):
    with pytest.raises(NormswapError, match=r"no batch dimension.*--static"):
        export(nn.ReLU(), torch.tensor(1.0), tmp_path / "m.onnx")
    with pytest.raises(NormswapError, match="no tensor"):
        export(nn.ReLU(), (3,), tmp_path / "m.onnx")
    assert export(nn.ReLU(), torch.tensor(1.0), tmp_path / "m.onnx", dynamic=False).passed


def test_a_folder_as_path_is_refused(images, tmp_path):
    with pytest.raises(NormswapError, match="is a folder"):
        export(nn.ReLU(), images, tmp_path)
