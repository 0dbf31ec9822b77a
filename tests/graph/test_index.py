"""The index of a captured model, beside what torch itself says of the model and its graphs."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap as ns
from normswap.graph import capture as capturing
from normswap.graph.capture import capture, captures_kept
from normswap.passes.modularize import Modularize
from normswap.passes.replace import Replace


class Shared(nn.Module):
    """One convolution under two names, called twice; a Linear that is tied to an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.same = self.conv
        self.norm = nn.BatchNorm2d(4)
        self.table = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(self.same(x)))
        rows = self.table(torch.arange(2))
        return self.head(x.mean((2, 3)) + rows) + self.table.weight.sum()


X = torch.randn(2, 4, 3, 3)


def test_a_module_has_all_its_paths_and_runs() -> None:
    model = Shared().eval()
    seen = capture(model, X)
    index = seen.index
    assert index.paths[model.conv] == ("conv", "same")
    assert index.first_path("same") == "conv"
    convs = [n for n in index.region_of if n.target is torch.ops.aten.conv2d.default]
    runs = index.runs[model.conv]
    assert [run.own for run in runs] == [[node] for node in convs]
    assert index.ran_in(model.conv) == set(convs)
    assert [index.module_of(node) for node in convs] == [model.conv] * 2
    whole = index.runs[model]
    assert len(whole) == 1
    assert set(convs) < set(whole[0].nodes)
    assert set(convs).isdisjoint(whole[0].own)
    assert sorted(index.position_of.values()) == list(range(len(index.region_of)))


def test_a_tensor_is_read_through_every_module_that_owns_it() -> None:
    model = Shared().eval()
    index = capture(model, X).index
    assert index.owners(model.table.weight) == {model.table, model.head}
    assert index.tensor("head.weight") is model.table.weight
    assert index.tensor("head.nothing") is index.tensor("nowhere.weight") is None
    by_table, by_head = (Counter(n.name for n in index.reads(p)) for p in ("table", "head"))
    # Each reads it as its own; the model's own sum reads it through both.
    assert by_table == Counter(["embedding", "sum_1"])
    assert by_head == Counter(["linear", "sum_1"])
    assert set(index.reads("head", ["bias"])) == set()


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that are captured, in order."""
    models: list[nn.Module] = []
    once = capturing._captured

    def counting(model: nn.Module, inputs: Any, training: bool) -> Any:
        models.append(model)
        return once(model, inputs, training)

    monkeypatch.setattr(capturing, "_captured", counting)
    return models


def test_passes_of_one_plan_share_a_capture(captured: list[nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    plan = ns.plan(model, Modularize(), Modularize(), Replace("group_norm"), inputs=X)
    assert plan.changed == ("1",)
    assert captured == [model]
    ns.plan(model, Replace("group_norm"), inputs=X)
    assert captured == [model] * 2  # another plan looks again


def test_a_model_that_changes_is_captured_again() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    with captures_kept():
        before = capture(model, X)
        assert capture(model, X) is before
        assert capture(model, X.clone()) is not before
        assert capture(model, X, anew=True) is not before
        ns.fold(model, X, inplace=True)
        after = capture(model, X)
        assert len(after.index.region_of) < len(before.index.region_of)
    assert capture(model, X) is not capture(model, X)
