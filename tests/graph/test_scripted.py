"""A child that torch.jit compiled stays what it is; the model around it is rewritten."""

from typing import Any

import pytest
import torch
from networks import batch_norms, error, in_eval, randomise
from torch import Tensor, nn

import normswap as ns
from normswap.core.errors import NormswapError


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > 0):
            return self.conv(x)
        return x * 2


class Around(nn.Module):
    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.child, self.conv, self.bn = child, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(self.child(self.first(x))))


CHILDREN = {
    "scripted": lambda: torch.jit.script(Branches().eval()),
    "traced": lambda: torch.jit.trace(nn.Conv2d(4, 4, 1).eval(), torch.randn(2, 4, 5, 5)),
    "scripted layer": lambda: torch.jit.script(nn.Conv2d(4, 4, 1)),
}


@pytest.mark.parametrize("child", CHILDREN.values(), ids=CHILDREN)
def test_a_model_with_a_scripted_child_folds_around_it(child: Any) -> None:
    model, x = randomise(Around(child())).double(), torch.randn(2, 4, 5, 5).double()
    weights = [each.detach().clone() for each in model.child.parameters()]
    expected, training = in_eval(model, x), [each.training for each in model.modules()]
    for inputs in (x, None):
        folded = ns.fold(model, inputs)
        assert batch_norms(folded) == []
        assert error(in_eval(folded, x), expected) <= 1e-10
        after = folded.child.parameters()
        assert all(torch.equal(a, b) for a, b in zip(after, weights, strict=True))
    assert error(in_eval(ns.freeze(model, x, mode="tune"), x), expected) <= 1e-10
    assert len(ns.inspect(model, x).sites) == 2
    assert [each.training for each in model.modules()] == training


def test_what_a_scripted_child_computes_takes_up_no_affine() -> None:
    model = nn.Sequential(
        torch.jit.trace(nn.Conv2d(4, 4, 1), torch.randn(1, 4, 5, 5)), nn.BatchNorm2d(4)
    )
    model, x = randomise(model).double(), torch.randn(2, 4, 5, 5).double()
    folded = ns.fold(model, x)
    assert batch_norms(folded) == ["1"]
    assert error(in_eval(folded, x), in_eval(model, x)) <= 1e-10
    (edit,) = ns.plan(model, ns.Fold(), inputs=x).edits
    assert "comes from 0" in edit.reason


def test_a_scripted_child_that_normalizes_is_refused_in_one_line() -> None:
    model = Around(torch.jit.script(nn.Sequential(nn.BatchNorm2d(4))))
    with pytest.raises(NormswapError, match="'child' is scripted"):
        ns.fold(model, torch.randn(2, 4, 5, 5))


def test_a_fold_with_inputs_is_never_weaker_than_one_without() -> None:
    class Opaque(nn.Module):
        """Runs, but not with torch.export's fake tensors."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(x.detach().numpy() * 2)

    class Leaf(Opaque):
        __module__ = "torch.nn"  # a module that a symbolic trace does not enter

    model, x = randomise(Around(Leaf())).double(), torch.randn(2, 4, 5, 5).double()
    folded = ns.fold(model, x)
    assert batch_norms(folded) == batch_norms(ns.fold(model, None)) == []
    assert error(in_eval(folded, x), in_eval(model, x)) <= 1e-10
