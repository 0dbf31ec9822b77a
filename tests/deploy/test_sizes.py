"""A file is open in the sizes that were asked for, and right in them, or the request is refused."""

import re

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.utils import _pytree

from normswap.core.errors import NormswapError
from normswap.deploy.export import export


def assert_same(path, model, *inputs):
    """The file gives what the model gives."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    feed = [each.numpy() for each in _pytree.tree_leaves(inputs)]
    with torch.no_grad():
        expected = _pytree.tree_leaves(model.eval()(*inputs))
    for actual, wanted in zip(
        session.run(None, dict(zip(names, feed, strict=True))), expected, strict=True
    ):
        np.testing.assert_allclose(actual, wanted.numpy(), rtol=1e-4, atol=1e-5)


class Tokens(nn.Module):
    """A table of 64 positions, and tokens that see those which the mask has."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.positions = nn.Parameter(torch.randn(64, 16))
        self.norm = nn.LayerNorm(16)

    def forward(self, tokens, mask):
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        scores = (x @ x.transpose(1, 2)).masked_fill(~mask.unsqueeze(1), -1e4)
        return self.norm(scores.softmax(-1) @ x)


class Recurrent(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.lstm = nn.LSTM(8, 16, batch_first=batch_first)

    def forward(self, x, state=None):
        return self.lstm(x, state)


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)

    def forward(self, a, b):
        a, b = (self.norm(self.conv(x)).relu().mean((2, 3)) for x in (a, b))
        return a @ b.T


def tokens(batch=2, length=7):
    return torch.randint(50, (batch, length)), torch.rand(batch, length) < 0.8


AXES = {0: "batch", 1: "length"}


@pytest.mark.parametrize(
    "dynamic",
    [
        "size",
        "all",
        {"tokens": AXES, "mask": AXES},
        (AXES, AXES),
        {"tokens": ["batch", "length"], "mask": (Dim("batch"), Dim("length", max=64))},
        {"tokens": {0: "batch", 1: Dim.DYNAMIC}, "mask": {0: "batch", 1: Dim.AUTO}},
    ],
)
def test_tokens_and_their_mask_are_open_together(dynamic, tmp_path):
    model = Tokens()
    report = export(model, tokens(), tmp_path / "m.onnx", dynamic=dynamic)
    assert report.passed and report.inputs["tokens"] == report.inputs["mask"]
    assert all(isinstance(size, str) for size in report.inputs["tokens"])
    assert report.inputs["tokens"][0] == "batch"
    for batch, length in ((1, 3), (5, 60)):
        assert_same(tmp_path / "m.onnx", model, *tokens(batch, length))
    shapes = {tuple(case.shapes[0]) for case in report.validation.cases}
    assert {n for n, _ in shapes} == {1, 2, 3} and {n for _, n in shapes} == {3, 7, 39}


def test_the_batch_alone_is_open_without_more(tmp_path):
    report = export(Tokens(), tokens(), tmp_path / "m.onnx", dynamic="batch")
    assert report.inputs == {"tokens": ["batch", 7], "mask": ["batch", 7]}


def test_an_axis_of_one_can_be_named(tmp_path):
    model = Tokens()
    report = export(model, tokens(1, 1), tmp_path / "m.onnx", dynamic=(AXES, AXES))
    assert report.passed
    assert_same(tmp_path / "m.onnx", model, *tokens(3, 4))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layer", [Recurrent(False), nn.TransformerEncoderLayer(8, 2, 16)])
def test_the_batch_of_a_model_with_the_time_first_is_the_second_axis(layer, batch, tmp_path):
    report = export(layer, torch.randn(5, batch, 8), tmp_path / "m.onnx")
    assert report.passed
    assert list(report.inputs.values()) == [[5, "batch", 8]]
    assert_same(tmp_path / "m.onnx", layer, torch.randn(5, 7, 8))


@pytest.mark.parametrize("batch_first", [False, True])
def test_the_state_of_a_recurrent_model_shares_its_batch(batch_first, tmp_path):
    model = Recurrent(batch_first)

    def inputs(batch):
        x = torch.randn(5, batch, 8)
        return x.transpose(0, 1) if batch_first else x, tuple(torch.randn(2, 1, batch, 16))

    report = export(model, inputs(3), tmp_path / "m.onnx")
    assert report.passed
    assert [shape.index("batch") for shape in report.inputs.values()] == [1 - batch_first, 1, 1]
    assert_same(tmp_path / "m.onnx", model, *inputs(4))


def test_two_batches_are_open_apart(tmp_path):
    model = Siamese()
    inputs = torch.randn(2, 3, 8, 8), torch.randn(3, 3, 8, 8)
    report = export(model, inputs, tmp_path / "m.onnx")
    assert report.passed
    assert report.inputs == {"a": ["batch", 3, 8, 8], "b": ["batch_2", 3, 8, 8]}
    assert_same(tmp_path / "m.onnx", model, torch.randn(5, 3, 8, 8), torch.randn(1, 3, 8, 8))


def test_all_is_what_the_model_takes_in_another_size(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))
    report = export(model, torch.randn(2, 3, 8, 9), tmp_path / "m.onnx", dynamic="all")
    assert report.passed and report.inputs == {"input": ["batch", 3, "height", "width"]}
    assert_same(tmp_path / "m.onnx", model, torch.randn(1, 3, 20, 5))
    linear = nn.Linear(4, 3)
    report = export(linear, torch.randn(2, 4), tmp_path / "m.onnx", dynamic="all")
    assert report.inputs == {"input": ["batch", 4]}


LINEAR = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5)), torch.randn(3, 4)


@pytest.mark.parametrize(
    ("model", "inputs", "dynamic", "message"),
    [
        (*LINEAR, "size", "no size beside the batch that can be left open.*3x8"),
        (*LINEAR, "sizes", "'sizes', which is none of batch, size, all"),
        (*LINEAR, {"input": {1: "width"}}, "size 'width' cannot be left open.*3x5"),
        (*LINEAR, {"x": {0: "batch"}}, "names 'x', but there are 'input'"),
        (*LINEAR, {"input": {2: "batch"}}, "axis 2 of a tensor of 2"),
        (*LINEAR, {"input": {-1: "batch"}}, "axis -1 of a tensor of 2"),
        (*LINEAR, {"input": {0: 7}}, "is 7; give a name"),
        (*LINEAR, {"input": {0: "a b"}}, "is 'a b'; give a name"),
        (*LINEAR, {"input": "batch"}, "is 'batch', for a tensor of 2 axes"),
        (*LINEAR, {"input": {0: {0: "batch"}}}, "give a name"),
        (*LINEAR, {}, "opens no axis"),
        (*LINEAR, {"input": {0: None}}, "opens no axis"),
        (*LINEAR, ({0: "batch"}, None), "not one entry for each of input"),
        (*LINEAR, 7, "not one entry for each of input"),
        (Tokens(), tokens(), {"tokens": AXES, "mask": {0: "batch", 1: "other"}}, "'length' cannot"),
        (Tokens(), tokens(), {"tokens": {0: "n", 1: "n"}}, "'n' is 2 and 7 in the inputs"),
        (Siamese(), (torch.randn(2, 3, 8, 8),) * 2, {"a": {1: "channels"}}, "'channels' cannot"),
        (nn.Identity(), torch.randn(0, 3), {"input": {0: "batch"}}, "is 0 in the inputs"),
    ],
)  # fmt: skip
def test_what_cannot_be_open_is_refused_in_one_line(model, inputs, dynamic, message, tmp_path):
    with pytest.raises(NormswapError, match=message) as caught:
        export(model, inputs, tmp_path / "m.onnx", dynamic=dynamic)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


class Sum(nn.Module):
    def forward(self, a, b):
        return a + b


def test_two_names_of_one_size_are_refused(tmp_path):
    inputs = torch.randn(2, 4), torch.randn(2, 4)
    report = export(Sum(), inputs, tmp_path / "m.onnx", dynamic=({0: "n"}, {0: "n"}))
    assert report.passed and report.inputs == {"a": ["n", 4], "b": ["n", 4]}
    with pytest.raises(NormswapError, match="size 'n' cannot be left open"):
        export(Sum(), inputs, tmp_path / "m.onnx", dynamic=({0: "n"}, {0: "m"}))


MODEL = """
import torch
from torch import nn

class Pair(nn.Module):
    def forward(self, x, y):
        return x.mean(1) + y.mean(1)

def pair():
    return Pair(), (torch.randn(2, 5, 3), torch.randn(2, 6, 3))
"""


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        (["--dynamic", "x:0=n,1=length", "--dynamic", "y:0=n"], [["n", "length", 3], ["n", 6, 3]]),
        (["--dynamic", "batch"], [["batch", 5, 3], ["batch", 6, 3]]),
        (["--static"], [[2, 5, 3], [2, 6, 3]]),
        (["--static", "--dynamic", "batch"], "exclude each other"),
        (["--dynamic", "x:0=n", "--dynamic", "size"], "takes an input and its axes.*not 'size'"),
        (["--dynamic", "x:n"], "takes an input and its axes.*not 'x:n'"),
        (["--dynamic", "x:0=n,0=m"], "twice"),
        (["--dynamic", "z:0=n"], "names 'z', but there are 'x', 'y'"),
    ],
)
def test_the_command_takes_the_same(options, shapes, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.py").write_text(MODEL, encoding="utf-8")
    status, _, told = run("export", "pairs.py:pair", "--out", "out", *options)
    if isinstance(shapes, str):
        assert status == 2
        assert re.search(shapes, " ".join(told.split()))
        return
    assert status == 0, told
    session = onnxruntime.InferenceSession("out/model.onnx", providers=["CPUExecutionProvider"])
    assert [entry.shape for entry in session.get_inputs()] == shapes
