"""Through every operator of the affine table a BatchNorm folds, in a model, where it must.

The models put each operator between a layer that mixes channels and a BatchNorm, in the two orders;
what must hold of a call is said with it, in `rule_cases`. The reference is the unmodified model.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import batch_norms, error, in_eval, randomise
from rule_cases import CASES, Case, Constant, Value, cases
from torch import Tensor, nn

import normswap as ns
from normswap.graph.capture import capture
from normswap.graph.rules import RULES
from normswap.passes import Fold

aten = torch.ops.aten
IN_PLACE = {t for t in CASES if getattr(t, "_schema", None) and t._schema.is_mutable}


class Mix(nn.Module):
    """A Linear over one axis."""

    def __init__(self, channels: int, axis: int) -> None:
        super().__init__()
        self.linear, self.axis = nn.Linear(channels, channels), axis

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.movedim(self.axis, -1)).movedim(-1, self.axis)


class Norm(nn.Module):
    """A BatchNorm over one axis; `undone` adds another that takes its affine back."""

    def __init__(self, channels: int, axis: int) -> None:
        super().__init__()
        self.bn, self.axis = nn.BatchNorm1d(channels), axis
        self.undo: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        moved = x.movedim(self.axis, 0)
        rows = moved.flatten(1) if moved.dim() > 1 else moved.unsqueeze(1)
        return self.undo(self.bn(rows.unsqueeze(0))).squeeze(0).view(moved.shape).movedim(
            0, self.axis
        )


class Around(nn.Module):
    """Mix, the operator, Norm (early); or Norm, the operator, Mix (late)."""

    def __init__(self, case: Case, *, early: bool) -> None:
        super().__init__()
        self.case, self.early = case, early
        output = case.run(lambda leaf: leaf.sample() if isinstance(leaf, Value) else leaf.tensor)
        channels = output.shape[case.out_axis] if output.dim() else 1
        self.inputs, self.before, self.leaves = [], nn.ModuleList(), {}
        for index, leaf in enumerate(case.leaves()):
            if isinstance(leaf, Value):
                self.leaves[leaf] = len(self.inputs)
                self.inputs.append(leaf.sample())
                norm = not early and len(self.inputs) == 1
                self.before.append((Norm if norm else Mix)(leaf.shape[leaf.axis], leaf.axis))
                continue
            self.leaves[leaf] = f"constant{index}"
            if leaf.tensor.is_floating_point():
                setattr(self, f"constant{index}", nn.Parameter(leaf.tensor))
            else:
                self.register_buffer(f"constant{index}", leaf.tensor)
        self.after = (Norm if early else Mix)(channels, case.out_axis)

    def forward(self, *inputs: Tensor) -> Tensor:
        values = [layer(x) for layer, x in zip(self.before, inputs, strict=True)]
        if self.case.target in IN_PLACE:
            values[0] = values[0].clone()

        def tensor(leaf: Any) -> Tensor:
            place = self.leaves[leaf]
            return values[place] if isinstance(place, int) else getattr(self, place)

        output = self.case.run(tensor)
        return self.after(output if output.dim() else output.view(1))


class All(nn.Module):
    """Independent branches, so that one capture serves them."""

    def __init__(self, branches: list[Around]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(x for branch in self.branches for x in branch.inputs)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs, start = [], 0
        for branch in self.branches:
            outputs.append(branch(*inputs[start : start + len(branch.inputs)]))
            start += len(branch.inputs)
        return tuple(outputs)


@st.composite
def of_all_operators(draw: st.DrawFn, *, early: bool) -> All:
    """A model with a branch for each operator of the table."""
    drawn = [draw(cases(target)) for target in RULES]
    torch.manual_seed(draw(st.integers(0, 100)))
    kept = [case for case in drawn if any(isinstance(leaf, Value) for leaf in case.leaves()) or early]
    model = All([Around(case, early=early) for case in kept]).double()
    randomise(model)
    return model


def norms(model: All) -> list[tuple[str, nn.BatchNorm1d, Case]]:
    return [
        (path, module, branch.case)
        for index, branch in enumerate(model.branches)
        for path, module in branch.named_modules(prefix=f"branches.{index}")
        if isinstance(module, nn.BatchNorm1d)
    ]


def folds(case: Case, *, early: bool) -> bool:
    return case.early if early else case.late


def outputs_agree(folded: nn.Module, model: All) -> None:
    for branch, actual, expected in zip(
        model.branches, in_eval(folded, *model.inputs), in_eval(model, *model.inputs), strict=True
    ):
        assert error(actual, expected) <= 1e-10, branch.case


some = settings(max_examples=4, deadline=None, derandomize=True)
DIRECTIONS = pytest.mark.parametrize("early", [True, False], ids=["early", "late"])


@DIRECTIONS
@some
@given(data=st.data())
def test_batch_norms_fold_through_every_operator(early: bool, data: st.DataObject) -> None:
    model = data.draw(of_all_operators(early=early))
    captured = {n.target for r in capture(model, model.inputs).regions for n in r.graph.nodes}
    assert captured.issuperset(branch.case.target for branch in model.branches)
    folded = ns.fold(model, model.inputs)
    outputs_agree(folded, model)
    left = batch_norms(folded)
    for path, _, case in norms(model):
        assert (path not in left) == (folds(case, early=early) and case.shift), (path, case)


@DIRECTIONS
@some
@given(data=st.data())
def test_a_batch_norm_without_shift_folds_through_more(early: bool, data: st.DataObject) -> None:
    model = data.draw(of_all_operators(early=early))
    for _, norm, _ in norms(model):
        nn.init.zeros_(norm.running_mean)
        nn.init.zeros_(norm.bias)
    folded = ns.fold(model, model.inputs)
    outputs_agree(folded, model)
    left = batch_norms(folded)
    for path, _, case in norms(model):
        absorbing = case.target.__name__.startswith("conv") and not early
        assert (path not in left) == (folds(case, early=early) or absorbing), (path, case)


@DIRECTIONS
@some
@given(data=st.data())
def test_what_takes_the_affine_back_gives_the_weights_back(
    early: bool, data: st.DataObject
) -> None:
    model = data.draw(of_all_operators(early=early))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for path, norm, _ in norms(model):
        undo = nn.BatchNorm1d(norm.num_features, eps=0.0).double()
        with torch.no_grad():
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            undo.running_mean.copy_(norm.bias)
            undo.weight.copy_(1 / scale)
            undo.bias.copy_(norm.running_mean)
        model.get_submodule(path.rpartition(".")[0]).undo = undo
    folded = ns.fold(model, model.inputs)
    outputs_agree(folded, model)
    left, after = batch_norms(folded), folded.state_dict()
    for index, branch in enumerate(model.branches):
        prefix = f"branches.{index}."
        if any(path.startswith(prefix) for path in left):
            assert not (folds(branch.case, early=early) and branch.case.shift)
            continue
        for name, tensor in before.items():
            if name.startswith(prefix) and name in after and tensor.is_floating_point():
                torch.testing.assert_close(after[name], tensor, rtol=1e-10, atol=1e-10)


