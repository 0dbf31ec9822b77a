"""Through every operator of the affine table a BatchNorm folds, in a model, where it must.

The models put each operator between a layer that mixes channels and a BatchNorm, in the two orders;
what must hold of a call is said with it, in `rule_cases`. The reference is the unmodified model.
"""

from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from networks import error, in_eval, randomise
from rule_cases import CASES, RULES, Case, Value, cases
from torch import Tensor, nn

import normswap as ns
from normswap.graph.capture import capture
from normswap.passes import Fold

aten = torch.ops.aten
IN_PLACE = {t for t in CASES if getattr(t, "_schema", None) and t._schema.is_mutable}


CONVS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


class Over(nn.Module):
    """A layer over the channels at axis 1, put over another axis."""

    def __init__(self, layer: nn.Module, axis: int) -> None:
        super().__init__()
        self.layer, self.axis = layer, axis

    def forward(self, x: Tensor) -> Tensor:
        moved = x.movedim(self.axis, 0)
        rows = moved.flatten(1) if moved.dim() > 1 else moved.unsqueeze(1)
        return self.layer(rows.unsqueeze(0)).squeeze(0).view(moved.shape).movedim(0, self.axis)


def mix(shape: tuple[int, ...], axis: int) -> nn.Module:
    """A layer that mixes the channels of a value."""
    channels = shape[axis]
    if axis == len(shape) - 1:
        return nn.Linear(channels, channels)
    if axis == 1 and len(shape) in CONVS:
        return CONVS[len(shape)](channels, channels, 1)
    return Over(nn.Conv1d(channels, channels, 1), axis)


def norm(shape: tuple[int, ...], axis: int) -> nn.Module:
    """A BatchNorm of the channels of a value, in a Sequential."""
    channels = shape[axis]
    if axis == 1 and len(shape) in NORMS:
        return nn.Sequential(NORMS[len(shape)](channels))
    return Over(nn.Sequential(nn.BatchNorm1d(channels)), axis)


class Around(nn.Module):
    """Mix, the operator, Norm (upstream); or Norm, the operator, Mix (downstream)."""

    def __init__(self, case: Case, *, upstream: bool) -> None:
        super().__init__()
        self.case, self.upstream = case, upstream
        output = case.run(lambda leaf: leaf.sample() if isinstance(leaf, Value) else leaf.tensor)
        out_shape, self.is_scalar = tuple(output.shape) or (1,), not output.dim()
        self.inputs, self.before, self.leaves = [], nn.ModuleList(), {}
        for index, leaf in enumerate(case.leaves()):
            if isinstance(leaf, Value):
                self.leaves[leaf] = len(self.inputs)
                self.inputs.append(leaf.sample())
                first = not upstream and len(self.inputs) == 1
                self.before.append((norm if first else mix)(leaf.shape, leaf.axis))
                continue
            self.leaves[leaf] = f"constant{index}"
            if leaf.tensor.is_floating_point():
                setattr(self, f"constant{index}", nn.Parameter(leaf.tensor))
            else:
                self.register_buffer(f"constant{index}", leaf.tensor)
        self.after = (norm if upstream else mix)(out_shape, case.out_axis)

    def forward(self, inputs: tuple[Tensor, ...]) -> Tensor:
        values = [layer(inputs[i]) for i, layer in enumerate(self.before)]
        if self.case.target in IN_PLACE:
            values[0] = values[0].clone()

        def tensor(leaf: Any) -> Tensor:
            place = self.leaves[leaf]
            return values[place] if isinstance(place, int) else getattr(self, place)

        output = self.case.run(tensor)
        return self.after(output.view(1) if self.is_scalar else output)


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
            outputs.append(branch(inputs[start : start + len(branch.inputs)]))
            start += len(branch.inputs)
        return tuple(outputs)


@st.composite
def of_operators(draw: st.DrawFn, *, upstream: bool, targets: list[Any]) -> All:
    """A model with a branch for each operator."""
    drawn = [draw(cases(target)) for target in targets]
    torch.manual_seed(draw(st.integers(0, 100)))
    model = All(
        [Around(case, upstream=upstream) for case in drawn if upstream or _takes_a_value(case)]
    )
    randomise(model.double())
    return model


def _takes_a_value(case: Case) -> bool:
    return any(isinstance(leaf, Value) for leaf in case.leaves())


def norms(model: All) -> list[tuple[str, nn.Module, Case]]:
    return [
        (path, module, branch.case)
        for index, branch in enumerate(model.branches)
        for path, module in branch.named_modules(prefix=f"branches.{index}")
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]


def fold(model: All) -> tuple[nn.Module, set[str]]:
    """The folded model, which computes the same, and the sites that a weight computes."""
    # Its modules decide by the rank of what they get, which is the same here always.
    plan = ns.plan(model, Fold(assume_example=True), inputs=model.inputs)
    folded = plan.apply(model)
    expected, actual = in_eval(model, *model.inputs), in_eval(folded, *model.inputs)
    for branch, mine, theirs in zip(model.branches, actual, expected, strict=True):
        assert error(mine, theirs) <= 1e-10, branch.case
    return folded, {edit.site for edit in plan.edits if edit.effect == "removes"}


# An example is a model of hundreds of layers, so there are few, and none is worth shrinking.
some = settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.generate])
one = settings(max_examples=1, deadline=None, derandomize=True, phases=[Phase.generate])
DIRECTIONS = pytest.mark.parametrize("upstream", [True, False], ids=["upstream", "downstream"])


@DIRECTIONS
@one
@given(data=st.data())
def test_batch_norms_fold_through_every_operator(upstream: bool, data: st.DataObject) -> None:
    model = data.draw(of_operators(upstream=upstream, targets=list(RULES)))
    if upstream:  # downstream the operators are the same
        seen = {n.target for r in capture(model, model.inputs).regions for n in r.graph.nodes}
        assert seen.issuperset(RULES)
    _, gone = fold(model)
    for path, _, case in norms(model):
        must = case.shift and (case.upstream if upstream else case.downstream)
        assert (path in gone) == must, (path, case)


SCALED = [
    *(aten.im2col.default, aten.pad.default, aten.constant_pad_nd.default, aten.mul.Tensor),
    *(aten.mul_.Tensor, aten.div.Tensor, aten.div_.Tensor, aten.avg_pool2d.default),
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv2d.padding),
    *(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.matmul.default),
]


@DIRECTIONS
@some
@given(data=st.data())
def test_a_scale_without_shift_passes_more(upstream: bool, data: st.DataObject) -> None:
    model = data.draw(of_operators(upstream=upstream, targets=SCALED))
    for _, norm, _ in norms(model):
        nn.init.zeros_(norm.running_mean)
        nn.init.zeros_(norm.bias)
    _, gone = fold(model)
    for path, _, case in norms(model):
        convolves = "conv" in str(case.target)
        assert (path in gone) == (case.upstream if upstream else case.downstream or convolves), (
            path,
            case,
        )


THERE_AND_BACK = [
    *(aten.permute.default, aten.cat.default, aten.slice.Tensor, aten.channel_shuffle.default),
    *(aten.add.Tensor, aten.mul.Scalar, aten.avg_pool2d.default, aten.max_pool2d.default),
    *(aten.conv2d.default, aten.conv_transpose2d.input, aten.linear.default, aten.addmm.default),
]


@DIRECTIONS
@some
@given(data=st.data())
def test_an_affine_and_its_inverse_give_the_weights_back(
    upstream: bool, data: st.DataObject
) -> None:
    model = data.draw(of_operators(upstream=upstream, targets=THERE_AND_BACK))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for path, norm, _ in norms(model):
        undo = type(norm)(norm.num_features, eps=0.0).double()
        with torch.no_grad():
            undo.running_mean.copy_(norm.bias)
            undo.weight.copy_((norm.running_var + norm.eps).sqrt() / norm.weight)
            undo.bias.copy_(norm.running_mean)
        model.get_submodule(path.rpartition(".")[0]).append(undo)
    folded, gone = fold(model)
    after = folded.state_dict()
    assert gone
    for path in gone:
        prefix = ".".join(path.split(".")[:2]) + "."
        for name in before.keys() & after.keys():
            if name.startswith(prefix) and before[name].is_floating_point():
                torch.testing.assert_close(after[name], before[name], rtol=1e-10, atol=1e-10)
