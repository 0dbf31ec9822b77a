"""A sample of the sweep over real architectures, and that its rules notice what breaks them."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import ConvBN, Residual, randomise
from torch import Tensor, nn

import normswap as ns
from normswap.passes import Fold

TOOLS = Path(__file__).parents[1] / "tools"
SWAPPED = ("mobilenet_v3_small", "shufflenet_v2_x0_5", "resnetv2_18")


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("zoo_measure")


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("classification", "resnet18"),
        ("timm", "dpn48b"),  # BatchNorm before the conv, concatenations
        ("classification", "mobilenet_v3_small"),
        ("classification", "shufflenet_v2_x0_5"),  # channel shuffle
        ("timm", "resnetv2_18"),  # pre-activation
        ("timm", "repvgg_a0"),  # parallel branches, one of them a BatchNorm alone
        ("timm", "levit_128s"),  # BatchNorm1d after Linear on a reshaped value
        ("timm", "test_coatnet"),  # LayerNorm beside BatchNorm
        ("detection", "fasterrcnn_mobilenet_v3_large_320_fpn"),  # captured in parts
    ],
)
def test_real_architecture_holds_the_rules_of_the_sweep(zoo: Any, family: str, name: str) -> None:
    row = zoo.Row(family=family, name=name)
    zoo.measure(row, lambda stage: None, swap=name in SWAPPED)
    assert row.batch_norms > 0 and row.left < row.batch_norms
    assert list(row.broken_rules()) == []


def test_each_rule_can_be_broken(zoo: Any) -> None:
    good = zoo.Row(
        family="timm",
        name="some",
        spread=1.0,
        left=2,
        fuse_left=2,
        fuse_error=1e-6,
        error64=1e-12,
        error=2e-5,
        distance=1e-5,
        left_because="2 x add",
    )
    assert list(good.broken_rules()) == []
    for change in (
        {"spread": 1e-6},
        {"spread": float("inf")},
        {"error64": 1e-9},
        {"error": 4e-5},
        {"distance": 1e-7},
        {"left": 3},
        {"left_because": f"1 x add | 1 x {zoo.NO_REASON}"},
    ):
        assert len(list(good.model_copy(update=change).broken_rules())) == 1, change


class Calls(nn.Module):
    """A BatchNorm called twice, one that is functional, and one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = ConvBN(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.block(x))
        return F.batch_norm(x, torch.zeros(4), torch.ones(4))


def test_every_executed_batch_norm_counts_and_no_other(zoo: Any) -> None:
    with zoo.executions(Calls().eval()) as executed:
        pass
    assert executed == []
    model = Calls().eval()
    with zoo.executions(model) as executed:
        model(torch.randn(2, 4, 8, 8))
    assert executed == ["block.bn", "block.bn", ""]
    with zoo.executions(model):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_scale_and_shift_that_a_fold_leaves_counts_once(zoo: Any, layout: Any) -> None:
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=layout)
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU()).eval()
    plan = ns.plan(randomise(model), Fold(), inputs=x)
    folded = plan.apply(model)
    with zoo.executions(folded) as executed:
        folded(x)
    assert executed == ["1"]
    assert zoo.reasons(plan, executed, model).startswith("1 x ")
    assert "relu" in zoo.reasons(plan, executed, model)


def test_batch_norm_left_without_a_reason_is_noticed(zoo: Any) -> None:
    model = Residual().eval()
    plan = ns.plan(model, Fold(), inputs=torch.randn(2, 3, 8, 8))
    assert zoo.NO_REASON in zoo.reasons(plan, ["bn"], model)  # it was folded


class InFloat32(nn.Module):
    """Computes in float32 in every way there is, whatever its input."""

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(3).float() + torch.ones(3) / 3 + torch.full((3,), 0.1)
        grid = torch.zeros(3, dtype=torch.float32) + steps.to(torch.float32)
        return x.float() / 3 + grid


def test_reference_is_computed_in_float64_throughout(zoo: Any) -> None:
    x = torch.randn(2, 3)
    case = zoo.zoo_models.Case(InFloat32(), x, "", (x,))
    (y,) = case.outputs64(case.model)
    expected = x.double() / 3 + torch.arange(3).double() + torch.ones(3).double() / 3 + 0.1
    assert y.dtype == torch.float64
    assert float((y - expected).abs().max()) <= 1e-15
    assert torch.get_default_dtype() == torch.float32
    (y,) = case.outputs(case.model)
    assert y.dtype == torch.float32


def test_rows_are_read_as_they_were_written(zoo: Any, tmp_path: Path) -> None:
    sweep = importlib.import_module("zoo_sweep")
    rows = [
        zoo.Row(
            family="classification", name="a", status="ok", left=1, batch_norms=3, error=1.25e-6
        ),
        zoo.Row(family="timm", name="b", why="fold: KeyError: 'x', y", left_because="2 x add"),
    ]
    sweep.write(tmp_path / "zoo.csv", rows)
    again = sweep.read(tmp_path / "zoo.csv")
    assert [row.name for row in again] == ["a", "b"]
    assert again[0].error == pytest.approx(1.25e-6, rel=0.05) and again[0].left == 1
    assert again[1] == rows[1]
    page = sweep.markdown(again)
    assert "| classification | 1/1 | 3 | 1 |" in page
    assert "| add | 2 |" in page and "- timm/b: fold: KeyError: 'x', y" in page
