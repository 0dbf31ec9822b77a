"""What a fold leaves: one scale and shift per channel, and no batch normalization when recorded."""

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from networks import randomise
from torch import Tensor, fx, nn

import normswap as ns
from normswap.norms.pointwise.channel_affine import ChannelAffine


def _affine(dtype: torch.dtype = torch.float64) -> ChannelAffine:
    affine = ChannelAffine(4, dtype=dtype)
    nn.init.normal_(affine.weight)
    nn.init.normal_(affine.bias)
    return affine


SHAPES = [(3, 4), (3, 4, 5), (3, 4, 5, 6), (3, 4, 5, 6, 2), (0, 4, 5, 6)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("last", [False, True])
def test_it_is_its_formula(shape: tuple[int, ...], last: bool) -> None:
    affine, x = _affine(), torch.randn(shape, dtype=torch.float64)
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    expected = (x.movedim(1, -1) * affine.weight + affine.bias).movedim(-1, 1)
    y = affine(x)
    assert torch.allclose(y, expected, rtol=1e-13, atol=1e-13)
    # Singleton axes have no layout of their own.
    assert y.is_contiguous() or not x.is_contiguous()


@pytest.mark.parametrize("last", [False, True])
def test_the_dtype_stays_that_of_the_input(last: bool) -> None:
    x = torch.randn(2, 4, 3, 3).bfloat16()
    x = x.to(memory_format=torch.channels_last) if last else x
    assert _affine(torch.float32)(x).dtype is torch.bfloat16
    with torch.autocast("cpu"):
        assert _affine(torch.float32)(x).dtype is torch.bfloat16


class Between(nn.Module):
    """A BatchNorm between two ReLUs, whose input is used again: it stays an affine."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        z: Tensor = self.last(self.bn(y)).relu() + y
        return z


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    model = randomise(Between()).eval()
    folded = ns.fold(model, X)
    assert isinstance(folded.bn, ChannelAffine)
    return model, folded


def _exported(model: nn.Module, strict: bool) -> tuple[Any, str]:
    program = torch.export.export(model, (X,), strict=strict)
    return program.module(), str(program.graph)


RECORDERS: dict[str, Callable[[nn.Module], tuple[Any, str]]] = {
    "export": lambda m: _exported(m, False),
    "strict export": lambda m: _exported(m, True),
    "trace": lambda m: (t := torch.jit.trace(m, X), str(t.inlined_graph)),
    "script": lambda m: (t := torch.jit.script(m), str(t.inlined_graph)),
    "fx": lambda m: (t := fx.symbolic_trace(m), str(t.graph)),
}


@pytest.mark.parametrize("how", RECORDERS)
def test_nothing_recorded_holds_a_batch_norm(models: tuple[nn.Module, nn.Module], how: str) -> None:
    model, folded = models
    recorded, operators = RECORDERS[how](copy.deepcopy(folded))
    assert "batch_norm" not in operators
    assert (recorded(X) - model(X)).abs().max() < 1e-5 * model(X).abs().max()


@pytest.mark.parametrize("target", ["generic", "onnxruntime"])
def test_onnx_holds_a_product_and_a_sum(
    models: tuple[nn.Module, nn.Module], target: Any, tmp_path: Path
) -> None:
    report = ns.export(models[1], X, tmp_path / "m.onnx", target=target)
    assert report.passed
    found = Counter(node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node)
    assert "BatchNormalization" not in found
    if target == "generic":
        assert found["Mul"] == 1
        assert found["Add"] == 2


def test_a_folded_model_has_no_normalization(models: tuple[nn.Module, nn.Module]) -> None:
    assert ns.inspect(models[1], X).sites == ()
    assert ns.inspect(models[1]).sites == ()
