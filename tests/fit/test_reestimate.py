"""Re-estimated statistics are those of all the data, and nothing else of the model changes."""

import warnings
from itertools import repeat
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Residual, batch_norms, randomise
from torch import Tensor, fx, nn

import normswap as ns
from normswap.core.errors import NormswapError
from normswap.fit.reestimate import reestimate
from normswap.nn import domain

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


def test_those_that_are_not_selected_keep_theirs() -> None:
    """And the selected ones see what these then give."""
    model, whole = network(), network()
    names = batch_norms(model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    reestimate(model, [X], exclude=names[0])
    (seen,) = inputs_of(model, names[1], X)
    assert torch.allclose(model.get_submodule(names[1]).running_mean, seen.mean((0, 2, 3)))
    kept = model.get_submodule(names[0])
    assert torch.equal(kept.running_mean, before[f"{names[0]}.running_mean"])
    assert torch.equal(kept.running_var, before[f"{names[0]}.running_var"])
    for name in names:  # one by one, in the order of the network, is all at once
        reestimate(whole, [X], include=name)
    assert torch.allclose(statistics(whole), statistics(reestimate(network(), [X])))


@pytest.mark.parametrize(
    ("globs", "words"),
    [({"include": "nothing"}, "matches none"), ({"exclude": "*"}, "leave no normalization")],
)
def test_a_selection_of_nothing_is_refused(globs: dict[str, str], words: str) -> None:
    with pytest.raises(NormswapError, match=words):
        reestimate(network(), [X], **globs)


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


def test_in_tune_mode_they_are_those_of_eval_mode() -> None:
    """Of what each BatchNorm would normalize, with the weights as they are."""
    model, x = network(), 100 * X + 1000  # far from the statistics that it has
    tuned = ns.freeze(model, X, mode="tune")
    keys = list(tuned.state_dict())
    reestimate(model, x.split(20))
    assert reestimate(tuned, x.split(20)) is tuned
    assert list(tuned.state_dict()) == keys
    torch.testing.assert_close(statistics(tuned), statistics(model))
    for each in (tuned.train(), ns.unfreeze(tuned).eval(), ns.bake(tuned).eval()):
        torch.testing.assert_close(each(x), model.eval()(x))


def test_in_tune_mode_a_module_called_twice_gets_those_of_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3, momentum=None)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)) * self.norm(input=self.conv(x + 1))

    model = randomise(Twice().double())
    tuned = ns.freeze(model, X, mode="tune")
    assert any("parametrizations" in name for name in tuned.state_dict())
    reestimate(tuned, X.split(20))
    values = torch.cat([model.conv(X), model.conv(X + 1)])
    torch.testing.assert_close(tuned.norm.running_mean, values.mean((0, 2, 3)))
    torch.testing.assert_close(tuned.norm.running_var, values.transpose(0, 1).flatten(1).var(1))


class ChannelsLast(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Masked(nn.BatchNorm1d):
    """Of the positions (N, L, C) only those that are no padding."""

    def forward(self, x: Tensor) -> Tensor:
        mask, y = x[..., 0] > 1, torch.zeros_like(x)
        y[mask] = super().forward(x[mask])
        return y


class Centred(nn.BatchNorm1d):
    """In a wider type, by torch's own operator."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.batch_norm(
            (x - 1).movedim(-1, 1).double(),
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.training,
            0.1,
            self.eps,
            False,
        )
        return y.movedim(1, -1).to(x.dtype)


@pytest.mark.parametrize(
    ("cls", "normalized"),
    [
        (ChannelsLast, lambda x: x.flatten(0, 1)),
        (Masked, lambda x: x[x[..., 0] > 1]),
        (Centred, lambda x: x.flatten(0, 1) - 1),
    ],
)
@pytest.mark.parametrize("frozen", [True, False])
def test_a_subclass_gets_those_of_what_it_normalizes(
    cls: type[nn.BatchNorm1d], normalized: Any, frozen: bool
) -> None:
    x = X.flatten(2).transpose(1, 2)
    model = nn.Sequential(cls(3)).double()
    model = ns.freeze(model) if frozen else model
    reestimate(model, x.split(7))
    values = normalized(x)
    torch.testing.assert_close(model[0].running_mean, values.mean(0))
    torch.testing.assert_close(model[0].running_var, values.var(0))


def test_a_hook_may_change_what_is_normalized() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3)).double()
    model[0].register_forward_pre_hook(lambda _, args: (args[0] * 3,))
    reestimate(model, [X])
    torch.testing.assert_close(model[0].running_mean, 3 * X.mean((0, 2, 3)))


def test_statistics_that_are_parameters_stay_parameters() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3)).double()
    for name in ("running_mean", "running_var"):
        value = model[0]._buffers.pop(name)
        model[0].register_parameter(name, nn.Parameter(value, requires_grad=False))
    before, held = model[0].running_mean.clone(), model[0].running_mean
    with pytest.raises(NormswapError, match="not finite"):
        reestimate(model, [X, X * torch.nan])
    assert torch.equal(held, before)
    reestimate(model, X.split(20))
    assert model[0].running_mean is held
    assert isinstance(held, nn.Parameter)
    torch.testing.assert_close(held.data, X.mean((0, 2, 3)))


def test_one_that_computes_by_a_formula_gets_those_of_its_input() -> None:
    torchvision = pytest.importorskip("torchvision.ops")
    model = nn.Sequential(nn.Conv2d(3, 3, 1), torchvision.FrozenBatchNorm2d(3)).double()
    expected = model[0](X).mean((0, 2, 3))
    for each in (model, ns.freeze(model, X, mode="tune")):
        reestimate(each, X.split(20))
        torch.testing.assert_close(each[1].running_mean, expected)


def test_those_of_the_current_domain_change() -> None:
    model = ns.convert(nn.Sequential(nn.BatchNorm2d(3)).double(), "adaptive_batch_norm")
    model[0].add_domain("night")
    with domain(model, "night"):
        reestimate(model, [X])
    assert not model[0].running_mean.any()
    torch.testing.assert_close(model[0].others.night.running_mean, X.mean((0, 2, 3)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_that_is_scripted_or_compiled_does_not_hide_what_follows() -> None:
    first = nn.Sequential(nn.Conv2d(3, 3, 1)).double()
    expected = first(X).mean((0, 2, 3))
    model = nn.Sequential(torch.jit.script(first), nn.BatchNorm2d(3).double())
    compiled = torch.compile(nn.Sequential(first, nn.BatchNorm2d(3).double()), backend="eager")
    for each in (model, compiled):
        reestimate(each, X.split(20))
        torch.testing.assert_close(statistics(each)[:3], expected)


@pytest.mark.parametrize(
    "method", ["batch_instance_norm", "conditional_batch_norm", "switchable_norm"]
)
def test_methods_that_mix_in_other_statistics_get_them_too(method: str) -> None:
    model = ns.convert(nn.Sequential(nn.BatchNorm2d(3)).double(), method)
    reestimate(model, X.split(20))
    torch.testing.assert_close(model[0].running_mean, X.mean((0, 2, 3)))
    torch.testing.assert_close(model[0].running_var, X.transpose(0, 1).flatten(1).var(1))


def test_fewer_batches_than_asked_for_are_said() -> None:
    with pytest.warns(UserWarning, match="10 batches, fewer than the 20"):
        reestimate(nn.BatchNorm2d(3).double(), repeat(X, 10), batches=20)
    with pytest.warns(UserWarning, match="1 batches, fewer than the 2"):
        reestimate(nn.BatchNorm2d(3).double(), [X], batches=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reestimate(nn.BatchNorm2d(3).double(), repeat(X), batches=2)


class Reversed(nn.BatchNorm2d):
    """Normalizes something else than its input, by a formula that nothing shows."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean[:, None, None], self.running_var[:, None, None]
        return (x.flip(1) - mean) * (var + self.eps).rsqrt()


class NoCopy(nn.BatchNorm2d):
    def __deepcopy__(self, memo: Any) -> "NoCopy":
        raise TypeError("cannot pickle it")


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        (Reversed(3), [X], "what '' normalizes cannot be seen"),
        (NoCopy(3), [X], "cannot be copied .cannot pickle it"),
        (nn.Sequential(nn.LazyBatchNorm2d()), [X], "'0' is lazy"),
        (nn.BatchNorm2d(3), None, "data is None, which holds no batches"),
        (nn.BatchNorm2d(3), 3, "data is 3, which holds no batches"),
        (nn.Sequential(nn.Conv2d(3, 3, 1)), [X], "no BatchNorm with running statistics"),
        (nn.BatchNorm2d(3), [], "there is no batch"),
        (nn.BatchNorm2d(3), [X.float(), X.float() * torch.nan], "not finite"),
        (nn.BatchNorm2d(3), [torch.ones(2, 4, 5, 5)], "does not run on an input of"),
    ],
)
def test_what_cannot_be_estimated_is_refused_and_nothing_changes(
    model: nn.Module, data: Any, words: str
) -> None:
    before = {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if not nn.parameter.is_lazy(tensor)
    }
    with pytest.raises(NormswapError, match=words) as raised:
        reestimate(model, data)
    assert "\n" not in str(raised.value)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("prior", [0.0, 16.0, 1e12])
def test_a_prior_counts_the_old_statistics_as_so_many_samples(prior: float) -> None:
    """Schneider et al. 2020, arXiv 2006.16971, equation 2, at each BatchNorm in turn."""
    model, source = network(), network()
    reestimate(model, X.split(20), prior=prior)
    kept, new = prior / (prior + len(X)), len(X) / (prior + len(X))
    for name in batch_norms(model):
        (seen,) = inputs_of(model, name, X)
        old, norm = source.get_submodule(name), model.get_submodule(name)
        seen = seen.movedim(1, 0).flatten(1)
        expected = kept * old.running_mean + new * seen.mean(1)
        torch.testing.assert_close(norm.running_mean, expected, rtol=1e-5, atol=1e-6)
        expected = kept * old.running_var + new * seen.var(1)
        torch.testing.assert_close(norm.running_var, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prior", [-1.0, float("nan"), float("inf")])
def test_a_prior_is_a_number_of_samples(prior: float) -> None:
    with pytest.raises(NormswapError, match="give a number of samples, 0 or more"):
        reestimate(network(), [X], prior=prior)
