"""Branches whose convolutions are calls, as in an exported program, are merged as well."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import batch_norms, error, randomise
from torch import Tensor, fx, nn

import normswap as ns
from normswap.passes import Fold
from normswap.passes.edits import ModularizeConv

X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Branches(nn.Module):
    """Two convs and a shortcut, each with its BatchNorm, then a transposed conv with its own."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
        self.up, self.after = nn.ConvTranspose2d(4, 3, 2, stride=2), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        large, small, same = self.norms
        x = F.relu(large(self.large(x)) + small(self.small(x)) + same(x))
        return self.after(self.up(x))


class Twice(Branches):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = F.relu(self.norms[0](self.large(x)) + self.small(x))
        return x


def exported(model: nn.Module, *, decomposed: bool = False) -> fx.GraphModule:
    program = torch.export.export(randomise(model.double()).eval(), (X,))
    return (program.run_decompositions() if decomposed else program).module()


def convs(model: fx.GraphModule) -> list[str]:
    """What computes convolutions in the graph: functions and modules."""
    called = [n for n in model.graph.nodes if n.op == "call_function" and "conv" in str(n.target)]
    modules = [n for n in model.graph.nodes if n.op == "call_module"]
    return [str(n.target) for n in called] + [
        str(n.target) for n in modules if "Conv" in type(model.get_submodule(n.target)).__name__
    ]


@pytest.mark.parametrize("decomposed", [False, True])
def test_the_branches_of_an_exported_program_become_one_convolution(decomposed: bool) -> None:
    model = exported(Branches(), decomposed=decomposed)
    folded = ns.fold(model, X)
    assert error(folded(X), model(X)) <= 1e-12
    assert len(convs(folded)) == 2  # with the transposed one
    assert batch_norms(folded) == []


def test_calls_that_share_a_weight_share_the_module() -> None:
    model = exported(Twice())
    folded = ns.fold(model, X)
    assert error(folded(X), model(X)) <= 1e-12
    assert sorted(convs(folded)) == ["large", "large", "small", "small"]
    assert batch_norms(folded) == []


def test_the_keys_of_the_state_dict_stay() -> None:
    model = exported(Branches())
    plan = ns.plan(model, Fold(), inputs=X)
    own = [edit for edit in plan.edits if isinstance(edit, ModularizeConv)]
    assert {edit.holder for edit in own} == {"large", "small"}
    keys = model.state_dict().keys()
    for edit in own:
        edit.apply(model)
    assert model.state_dict().keys() == keys


def test_saved_and_loaded_it_is_merged_again(tmp_path: Path) -> None:
    def make() -> fx.GraphModule:
        torch.manual_seed(0)
        return exported(Branches())

    folded = ns.fold(make(), X)
    ns.save(folded, tmp_path / "folded")
    assert torch.equal(ns.load(tmp_path / "folded", source=make)(X), folded(X))


def test_an_assertion_about_a_branch_goes_with_it() -> None:
    class Checked(Branches):
        def forward(self, x: Tensor) -> Tensor:
            small = self.small(x)
            torch._assert(small.ndim == 4, "expected an image")
            return F.relu(self.norms[0](self.large(x)) + self.norms[1](small))

    model = fx.symbolic_trace(randomise(Checked().double()).eval())
    folded = ns.fold(model, X)
    assert error(folded(X), model(X)) <= 1e-12
    assert convs(folded) == ["large"]
