"""Tune mode with affines that move into what follows, and through sums and concatenations."""

import pytest
import torch
import torch.nn.functional as F
from networks import error, in_eval, randomise
from torch import Tensor, nn

import normswap as ns
from normswap.passes import Freeze
from normswap.passes.edits import FoldIntoTensor


class BothSides(nn.Module):
    """BatchNorms before two convolutions, after their concatenation, and before mean and Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.left, self.right = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(3, 4, 3)
        self.joined = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 6, 3, groups=2)
        self.last = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = F.relu(self.joined(torch.cat([self.left(x), self.right(x)], 1)))
        return self.fc(self.last(F.gelu(self.conv(x))).mean((2, 3)))


@pytest.fixture
def model() -> nn.Module:
    return randomise(BothSides()).double()


X = torch.randn(2, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_every_affine_moves_and_two_of_them_forward(model: nn.Module) -> None:
    plan = ns.plan(model, Freeze("tune"), inputs=X)
    shares = [edit for edit in plan.edits if isinstance(edit, FoldIntoTensor)]
    into = {site: {s.path for s in shares if s.site == site} for site in plan.changed}
    assert into == {"first": {"left", "right"}, "joined": {"left", "right"}, "last": {"fc"}}
    assert {s.site for s in shares if s.role == "input_bias"} == {"first", "last"}
    assert not any(s.inverse for s in shares)


def test_function_and_gradients_are_those_of_eval_mode(model: nn.Module) -> None:
    tuned, frozen = ns.freeze(model, X, mode="tune").train(), ns.freeze(model).train()
    for net in (tuned, frozen):
        net(X).square().sum().backward()
    assert error(tuned(X), frozen(X)) <= 1e-12
    gradients = {name: p.grad for name, p in frozen.named_parameters()}
    seen = 0
    for name, parameter in tuned.named_parameters():
        name = name.replace("parametrizations.", "").replace(".original", "")
        if name != "left.bias":  # given, and never trained
            assert error(parameter.grad, gradients[name]) <= 1e-12, name
            seen += 1
    assert seen == len(gradients)


def test_steps_of_training_equal_those_of_eval_mode(model: nn.Module) -> None:
    outputs = []
    for net in (ns.freeze(model, X, mode="tune").train(), ns.freeze(model).train()):
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 1e-2, 0.9)
        for _ in range(4):
            optimizer.zero_grad()
            net(X).square().sum().backward()
            optimizer.step()
        outputs.append(net(X).detach())
    assert error(*outputs) <= 1e-10
    assert error(outputs[0], in_eval(model, X)) > 1e-3  # it has learnt something


def test_unfreezing_puts_everything_back(model: nn.Module) -> None:
    back = ns.unfreeze(ns.freeze(model, X, mode="tune"))
    assert list(back.state_dict()) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    assert torch.equal(in_eval(back, X), in_eval(model, X))


@pytest.mark.parametrize("fold", [lambda m: ns.bake(m), lambda m: ns.fold(m, X)])
def test_baking_leaves_plain_weights(model: nn.Module, fold: object) -> None:
    baked = fold(ns.freeze(model, X, mode="tune"))  # type: ignore[operator]
    assert not any(torch.nn.utils.parametrize.is_parametrized(m) for m in baked.modules())
    assert all(isinstance(baked.get_submodule(n), nn.Identity) for n in ("first", "joined", "last"))
    assert error(in_eval(baked, X), in_eval(model, X)) <= 1e-12
