"""A functional batch norm with training=True freezes to its running statistics, then folds."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap as ns

X = torch.randn(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self, *, training: bool = True, running: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.weight, self.bias = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(4))
        self.register_buffer("mean", torch.rand(4))
        self.register_buffer("var", torch.rand(4) + 0.5)
        self.use, self.running = training, running

    def forward(self, x: Tensor) -> Tensor:
        mean, var = (self.mean, self.var) if self.running else (None, None)
        x = self.conv(x)
        return F.batch_norm(x, mean, var, self.weight, self.bias, training=self.use).relu()


def exported_in_training() -> tuple[nn.Module, nn.Module]:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double()
    for tensor in (*model[1].parameters(), model[1].running_mean, model[1].running_var):
        tensor.data = torch.rand(4, dtype=torch.float64) + 0.5
    return torch.export.export(model.train(), (X,)).module(), model.eval()


def same(a: nn.Module, b: nn.Module) -> bool:
    with torch.no_grad():
        return torch.allclose(a(X), b(X), rtol=1e-11, atol=1e-11)


def pair() -> tuple[Net, Net]:
    """The model, and the same with its running statistics."""
    model, running = Net().double().eval(), Net(training=False).double().eval()
    running.load_state_dict(model.state_dict())
    return model, running


def test_frozen_it_uses_its_running_statistics() -> None:
    model, running = pair()
    frozen = ns.freeze(model, X)
    assert same(frozen, running)
    assert same(frozen.train(), running)
    tuned = ns.freeze(model, X, mode="tune")
    assert same(tuned.train(), running)


def test_once_frozen_it_folds() -> None:
    model, running = pair()
    folded = ns.fold(ns.freeze(model, X), X)
    assert same(folded, running)
    assert not ns.inspect(folded, X).sites


def test_a_fold_alone_leaves_it_and_says_how_it_could() -> None:
    model, _ = pair()
    plan = ns.plan(model, ns.Fold(), inputs=X)
    (left,) = plan.left
    assert "freeze makes it use those" in left.reason
    assert "has no running statistics" not in left.reason
    assert same(plan.apply(model), model)


@pytest.mark.parametrize("running", [True, False])
def test_it_is_replaced_like_any_other(running: bool) -> None:
    model = Net(running=running).double().eval()
    converted = ns.convert(model, "group_norm", inputs=X, groups=2)
    expected = F.group_norm(model.conv(X), 2, model.weight, model.bias, 1e-5).relu()
    assert torch.allclose(converted(X), expected, rtol=1e-11)


def test_without_running_statistics_there_is_nothing_to_freeze() -> None:
    model = Net(running=False).double().eval()
    (left,) = ns.plan(model, ns.Freeze(), inputs=X).left
    assert "has no running statistics" in left.reason


def test_a_program_exported_in_training_mode_freezes_and_folds() -> None:
    program, model = exported_in_training()
    frozen = ns.freeze(program, X)
    assert same(frozen, model)
    folded = ns.fold(frozen, X)
    assert same(folded, model)
    assert not ns.inspect(folded, X).sites


def test_a_program_exported_in_training_mode_is_converted() -> None:
    program, model = exported_in_training()
    converted = ns.convert(program, "group_norm", inputs=X, groups=2)
    norm = model[1]
    expected = F.group_norm(model[0](X), 2, norm.weight, norm.bias, 1e-5).relu()
    assert torch.allclose(converted(X), expected, rtol=1e-11)
