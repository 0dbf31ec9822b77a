"""Every method of the registry is exported and validated in the opsets from 13 to 23.

Two old opsets for each method, 13 and one that takes turns, from one graph of torch's; every third
method in a newer one as well, in which torch writes it itself.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import randomise
from torch import Tensor, nn

import normswap as ns

METHODS = {name: method for name, method in ns.methods().items() if not method.onnx}


def opsets(index: int) -> list[int]:
    """Of the method that is the index-th."""
    newer = [19 + index // 3 % 5] if index % 3 == 0 else []
    return [13, 14 + index % 4, *newer]


@pytest.fixture
def written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch writes of the model of one test is kept, by the opset in which it does."""
    kept: dict[int, Any] = {}
    write: Callable[..., Any] = torch.onnx.export

    def export(*args: Any, opset_version: int, **options: Any) -> Any:
        if opset_version not in kept:
            kept[opset_version] = write(*args, opset_version=opset_version, **options)
        program = kept[opset_version]
        return torch.onnx.ONNXProgram(program.model.clone(), program.exported_program)

    monkeypatch.setattr(torch.onnx, "export", export)


def swapped(name: str) -> tuple[nn.Module, Tensor]:
    """A small network with the method, and an example input."""
    method = METHODS[name]
    if method.kind == "recurrent":
        network, x = nn.Sequential(nn.LSTM(3, 4, batch_first=True)), torch.randn(2, 3, 3)
    else:
        layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
        network, x = randomise(nn.Sequential(*layers)), torch.randn(2, 1, 6, 6)
    network.eval()
    if method.kind == "input":
        return nn.Sequential(ns.create(name, 1).fit([x]), network).eval(), x
    if method.kind == "weight" and not method.folds_scale:
        return ns.parametrize(network, name), x
    return ns.convert(network, name, inputs=x).eval(), x


def test_each_opset_is_that_of_some_method() -> None:
    assert {n for index in range(len(METHODS)) for n in opsets(index)} == {*range(13, 24)} - {18}


@pytest.mark.usefixtures("written_once")
@pytest.mark.parametrize(("index", "name"), list(enumerate(METHODS)), ids=list(METHODS))
def test_the_method_is_exported(index: int, name: str, tmp_path: Path) -> None:
    model, x = swapped(name)
    for opset in opsets(index):
        report = ns.export(model, x, tmp_path / "model.onnx", opset=opset)
        assert report.passed and report.opset == opset
