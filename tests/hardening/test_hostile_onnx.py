"""ONNX files from elsewhere: read inside their folder alone, and what is wrong told in one line."""

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from children import contents
from onnx import TensorProto, helper
from torch import Tensor, nn

from normswap.core.errors import NormswapError
from normswap.deploy.validate import validate

X = torch.ones(2, 4)


class Adds(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.arange(4.0)


def write(path: Path, **external: str | int) -> Path:
    """x + w, with w in another file."""
    weight = TensorProto(name="w", data_type=1, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in external.items():
        weight.external_data.add(key=key, value=str(value))
    return graph(path, ["n", 4], [helper.make_node("Add", ["x", "w"], ["y"])], [weight])


def graph(path: Path, shape: list, nodes: list, weights: list = ()) -> Path:
    x, y = (helper.make_tensor_value_info(name, 1, shape) for name in "xy")
    made = helper.make_graph(nodes, "g", [x], [y], list(weights))
    opset = [helper.make_opsetid("", 18)]
    path.write_bytes(helper.make_model(made, opset_imports=opset, ir_version=9).SerializeToString())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    numbers = np.arange(4, dtype=np.float32).tobytes()
    (tmp_path / "secret").write_bytes(numbers)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "w").write_bytes(numbers)
    return tmp_path / "m"


def refused(path: Path, inputs: Tensor | None = X) -> str:
    with pytest.raises(NormswapError) as error:
        validate(path, Adds(), inputs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_weights_beside_the_file_are_read(folder: Path) -> None:
    assert validate(write(folder / "m.onnx", location="w"), Adds(), X).passed


@pytest.mark.parametrize("how", ["../secret", "absolute", "link", "m/../../secret", "/dev/zero"])
def test_weights_elsewhere_are_not_read(how: str, folder: Path) -> None:
    (folder / "m").mkdir()
    (folder / "link").symlink_to(folder.parent / "secret")
    location = str(folder.parent / "secret") if how == "absolute" else how
    told = refused(write(folder / "m.onnx", location=location))
    # In the words of ONNX Runtime, or of onnx where ONNX Runtime is older than 1.24.
    reasons = ("External data path", "outside the directory", "symbolic link")
    assert any(reason in told for reason in reasons) or how in ("absolute", "/dev/zero")


@pytest.mark.parametrize(
    "external",
    [
        {"location": "gone"},
        {"location": ""},
        {"location": "."},
        {"location": "w", "offset": 10**12},
        {"location": "w", "offset": -4},
        {"location": "w", "length": 10**12},
        {"location": "w", "length": "many"},
        {},
    ],
    ids=str,
)
def test_weights_that_are_not_there_are_told(external: dict, folder: Path) -> None:
    refused(write(folder / "m.onnx", **external))


@pytest.mark.parametrize("kind", ["pipe", "folder", "empty", "text", "nothing", "device"])
def test_what_is_no_onnx_file_is_told_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind != "nothing":
        path.write_text("" if kind == "empty" else "no protobuf")
    refused(path)


def test_an_input_of_any_size_is_not_made_up(folder: Path) -> None:
    path = graph(folder / "m.onnx", [10**6, 10**6], [helper.make_node("Identity", ["x"], ["y"])])

    with pytest.raises(NormswapError, match="no values can be guessed"):
        validate(path, nn.Identity())


def test_damaged_files_are_refused_or_give_a_report(folder: Path) -> None:
    path, random = write(folder / "m.onnx", location="w"), np.random.default_rng(0)
    whole = path.read_bytes()
    assert len(onnx.load(path, load_external_data=False).graph.node) == 1
    before, outcomes = contents(folder.parent), set[object]()

    def damaged(content: bytes) -> None:
        path.write_bytes(content)
        try:
            outcomes.add(validate(path, Adds(), X).passed)
        except NormswapError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")

    damaged(whole)
    for size in range(0, len(whole), 7):
        damaged(whole[:size])
    for _ in range(60):
        content = bytearray(whole)
        for place in random.integers(0, len(whole), random.integers(1, 4)):
            content[place] = random.integers(256)
        damaged(bytes(content))
    path.write_bytes(whole)
    assert contents(folder.parent) == before
    assert outcomes >= {"refused", True}
