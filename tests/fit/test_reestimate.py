"""Re-estimated statistics are those of all the data, and nothing else of the model changes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Residual, batch_norms, randomise
from torch import Tensor, fx, nn

import normswap as ns
from normswap.errors import NormswapError
from normswap.fit.reestimate import reestimate

X = (
    torch.randn(60, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    + 1
)


class Twice(nn.Module):
    """One BatchNorm called on two values of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.relu(self.conv(self.norm(x))))


def network() -> nn.Module:
    torch.manual_seed(0)
    return randomise(Residual()).double()


def statistics(model: nn.Module) -> Tensor:
    kept = [
        b for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))
    ]
    return torch.cat(kept)


def inputs_of(model: nn.Module, path: str, x: Tensor) -> list[Tensor]:
    """What the module at `path` is called with in eval mode."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].clone())
    )
    with torch.no_grad():
        model.eval()(x)
    handle.remove()
    return seen


def test_they_are_those_of_what_each_batch_norm_is_given() -> None:
    """Given by those before it with the new statistics, in the model that comes out."""
    model = reestimate(network(), X.split(7))
    for path in batch_norms(model):
        (x,) = inputs_of(model, path, X)
        norm = model.get_submodule(path)
        dims = [0, *range(2, x.dim())]
        torch.testing.assert_close(norm.running_mean, x.mean(dims), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(norm.running_var, x.var(dims), rtol=1e-6, atol=1e-6)


def test_one_batch_of_everything_is_torchs_own() -> None:
    norm = nn.BatchNorm2d(3, momentum=1.0).double()
    own = nn.BatchNorm2d(3).double()
    norm.train()(X)
    reestimate(own, X.split(9))
    torch.testing.assert_close(own.running_mean, norm.running_mean)
    torch.testing.assert_close(own.running_var, norm.running_var)


@pytest.mark.parametrize("batch_size", [1, 8, 60])
def test_they_depend_neither_on_batch_size_nor_on_order(batch_size: int) -> None:
    expected = statistics(reestimate(network(), X.split(13)))
    shuffled = X[torch.randperm(len(X))]
    again = statistics(reestimate(network(), shuffled.split(batch_size)))
    torch.testing.assert_close(again, expected, rtol=1e-6, atol=1e-6)


def test_those_of_a_module_called_twice_are_of_both_calls() -> None:
    model = reestimate(randomise(Twice().double()), X.split(20))
    values = torch.cat([x.transpose(0, 1).flatten(1) for x in inputs_of(model, "norm", X)], 1)
    torch.testing.assert_close(model.norm.running_mean, values.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.norm.running_var, values.var(1), rtol=1e-6, atol=1e-6)


def test_all_else_is_as_before() -> None:
    model = network().train()
    norm = model.get_submodule(batch_norms(model)[0])
    norm.register_forward_hook(lambda *_: None)
    before = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    state, hooks = torch.random.get_rng_state(), len(norm._forward_hooks)
    assert reestimate(model, X.split(20)) is model
    after = model.state_dict(keep_vars=True)
    assert {name: id(tensor) for name, tensor in after.items()} == {
        name: identity for name, (identity, _) in before.items()
    }
    changed = {name for name, (_, value) in before.items() if not torch.equal(after[name], value)}
    assert all(name.endswith(("running_mean", "running_var")) for name in changed)
    assert len(changed) == 2 * len(batch_norms(model))
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(norm._forward_hooks) == hooks
    assert not norm._forward_pre_hooks


def test_a_frozen_batch_norm_gets_them_and_stays_frozen() -> None:
    frozen = ns.freeze(network())
    expected = statistics(reestimate(network(), X.split(20)))
    torch.testing.assert_close(statistics(reestimate(frozen, X.split(20))), expected)
    before = statistics(frozen)
    frozen.train()(X)
    assert torch.equal(statistics(frozen), before)


def test_a_graph_module_keeps_its_hooks_meanwhile() -> None:
    """torch's own copy of one would run without them."""
    norm = nn.Sequential(nn.BatchNorm2d(3)).double()
    model = fx.symbolic_trace(norm)
    model.register_forward_pre_hook(lambda _, args: (args[0] + 2,))
    reestimate(model, [X])
    torch.testing.assert_close(norm[0].running_mean, X.mean((0, 2, 3)) + 2)


def test_other_data_change_the_statistics_to_theirs() -> None:
    """Domain shift: the same images, brighter."""
    norm = reestimate(nn.Sequential(nn.BatchNorm2d(3)).double(), [X])
    before = norm[0].running_mean.clone()
    reestimate(norm, [X + 5])
    torch.testing.assert_close(norm[0].running_mean, before + 5)


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        (nn.Sequential(nn.Conv2d(3, 3, 1)), [X], "no BatchNorm with running statistics"),
        (nn.BatchNorm2d(3), [], "there is no batch"),
        (nn.BatchNorm2d(3), [X.float(), X.float() * torch.nan], "not finite"),
        (nn.BatchNorm2d(3), [torch.ones(2, 4, 5, 5)], "rejects a batch"),
    ],
)
def test_what_cannot_be_estimated_is_refused_and_nothing_changes(
    model: nn.Module, data: Any, words: str
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(NormswapError, match=words):
        reestimate(model, data)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
