"""A plan is data: it goes to JSON and back, and is carried out whole or not at all."""

import copy
import json
import re
from collections.abc import Callable
from threading import Lock
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import ConvBN, Residual, error, in_eval, randomise
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import normswap as ns
from normswap.passes import Bake, Fold, Freeze, Replace, Unfreeze, edits
from normswap.passes.modularize import Modularize
from normswap.passes.recipe import recipe_of

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
PASSES = [Replace("group_norm"), Fold(), Freeze("eval"), Freeze("tune"), Replace("identity")]


def normed() -> nn.Module:
    """A model with a parametrization of every sort in it."""
    torch.manual_seed(0)
    model = randomise(Residual())
    parametrizations.weight_norm(model.conv)
    parametrizations.spectral_norm(model.fc)
    return model


def _structure(model: nn.Module) -> dict[str, Any]:
    """Everything that a rewrite could have changed."""
    return {
        path: (
            module,
            type(module),
            module.training,
            dict(module._modules),
            dict(module._parameters),
            dict(module._buffers),
            {k: v for k, v in vars(module).items() if not k.startswith("_")},
            [p.requires_grad for p in module.parameters()],
        )
        for path, module in model.named_modules()
    }


@pytest.mark.parametrize("each", PASSES, ids=str)
def test_planning_changes_nothing(each: Any) -> None:
    model = normed().train()
    before, state = _structure(model), copy.deepcopy(model.state_dict())
    rng = torch.get_rng_state()
    assert ns.plan(model, each, inputs=X).edits
    assert _structure(model) == before
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("each", PASSES, ids=str)
def test_json_round_trip_rebuilds_the_same_on_a_fresh_model(each: Any) -> None:
    model = normed()
    plan = ns.plan(model, each, inputs=X)
    text = plan.to_json()
    assert json.loads(text)
    again = ns.Plan.from_json(text)
    assert again == plan
    a, b = plan.apply(model), again.apply(normed())
    assert [type(m).__name__ for m in a.modules()] == [type(m).__name__ for m in b.modules()]
    assert {n: t.shape for n, t in a.state_dict().items()} == {
        n: t.shape for n, t in b.state_dict().items()
    }
    b.load_state_dict(a.state_dict())
    assert torch.equal(in_eval(a, X), in_eval(b, X))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no json",
        "[]",
        "{}}",
        '{"edits": [{"edit": "explode"}]}',
        '{"edits": [{"edit": "freeze"}]}',
        '{"surprise": 1}',
        '{"edits": 5}',
        "[" * 5000,
    ],
)
def test_garbage_is_no_plan(text: str) -> None:
    with pytest.raises(ns.NormswapError, match="not a plan") as raised:
        ns.Plan.from_json(text)
    assert "\n" not in str(raised.value)


class Other(nn.Module):
    """Has modules at the paths of Residual, but other ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Module()
        self.first.conv, self.first.bn = nn.ReLU(), nn.Conv2d(8, 8, 1)
        self.conv, self.bn = nn.BatchNorm2d(8), nn.ReLU()
        self.shortcut = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm2d(9))
        self.after, self.fc, self.head = nn.Linear(8, 8), nn.ReLU(), nn.GroupNorm(2, 6)


class Wider(Other):
    """The same norms with another number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = ConvBN(3, 16)
        self.conv, self.bn = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)
        self.shortcut = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.after, self.fc, self.head = nn.BatchNorm2d(16), nn.Linear(16, 6), nn.BatchNorm1d(6)


@pytest.mark.parametrize("each", [*PASSES, Bake()], ids=str)
@pytest.mark.parametrize("other", [lambda: nn.Sequential(nn.ReLU()), Other, Wider])
def test_plan_for_another_model_is_refused(each: Any, other: Callable[[], nn.Module]) -> None:
    plan = ns.plan(normed(), each, inputs=X)
    model = other()
    if other is Wider and str(each).startswith("Freeze(eval)"):
        return  # a freeze does not depend on the number of channels
    before = _structure(model)
    with pytest.raises(ns.NormswapError, match="plan") as raised:
        plan.apply(model, inplace=True)
    assert "\n" not in str(raised.value)
    assert _structure(model) == before


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("each", [*PASSES, Bake()], ids=str)
def test_plan_that_fails_leaves_the_model_as_it_was(
    each: Any, stop: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = normed().train()
    model.bn.register_forward_hook(lambda *_: None)
    plan = ns.plan(model, each, inputs=X)
    before, state = _structure(model), copy.deepcopy(model.state_dict())
    expected = in_eval(copy.deepcopy(model), X)
    last = type(plan.edits[-1])
    apply, count = last.apply, sum(type(edit) is last for edit in plan.edits)
    calls: list[int] = []

    def failing(self: Any, model: nn.Module) -> None:
        apply(self, model)
        calls.append(1)
        if len(calls) == count:
            raise stop

    monkeypatch.setattr(last, "apply", failing)
    with pytest.raises(stop):
        plan.apply(model, inplace=True)
    assert _structure(model) == before
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert torch.equal(in_eval(copy.deepcopy(model), X), expected)
    monkeypatch.undo()
    assert error(in_eval(ns.fold(model, X), X), expected) <= 1e-5  # and it still can be rewritten


def test_passes_are_planned_one_after_the_other() -> None:
    model = randomise(Residual())
    plan = ns.plan(model, Fold(exclude="after"), Replace("group_norm"), inputs=X)
    assert plan.passes == ("Fold", "Replace(group_norm)")
    new = plan.apply(model)
    assert isinstance(new.after, nn.GroupNorm)
    assert isinstance(new.bn, nn.Identity)
    assert ns.Plan.from_json(plan.to_json()) == plan


def test_every_site_is_changed_or_left_with_a_reason() -> None:
    plan = ns.plan(Residual(), Fold(exclude="after"), inputs=X)
    assert plan.changed == ("first.bn", "bn", "shortcut.1", "head")
    assert [left.site for left in plan.left] == ["after"]
    assert all(each.reason for each in (*plan.edits, *plan.left))
    for name in (*plan.changed, "after"):
        assert name in str(plan)


class Called(nn.Module):
    """Two batch norms called as functions: a convolution takes the first, nothing the second."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        for name in ("mean", "var", "mean1", "var1"):
            self.register_buffer(name, torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(self.conv(x), self.mean, self.var).relu()
        return F.batch_norm(x, self.mean1, self.var1).relu()


def test_the_table_says_last_why_a_site_is_folded_or_stays() -> None:
    text = str(ns.plan(Called(), Fold(), inputs=X))
    assert re.search(r"batch_norm +give it a module; fold into conv +\w+\(4\)", text)
    assert re.search(
        r"batch_norm_1 .* conv; +its scale is in the weight; its shift .*\n +one shift per channel",
        text,
    )
    assert "graph from now on" in str(ns.plan(Called(), Modularize(), inputs=X))
    tuned = ns.freeze(Residual(), X, mode="tune")
    assert "belongs to" not in str(ns.plan(tuned, Unfreeze()))


def test_the_recipe_remembers_every_edit() -> None:
    model = randomise(Residual())
    done = ns.plan(model, Fold(exclude="after"), inputs=X)
    then = ns.plan(done.apply(model), Replace("group_norm"))
    new = copy.deepcopy(then.apply(done.apply(model)))
    assert recipe_of(new).edits == (*done.edits, *then.edits)
    assert recipe_of(new).passes == ("Fold", "Replace(group_norm)")
    assert recipe_of(model).edits == ()


def test_model_that_cannot_be_copied_is_refused_with_the_remedy() -> None:
    model = ConvBN(3, 4)
    model.lock = Lock()
    with pytest.raises(ns.NormswapError, match="inplace=True"):
        ns.convert(model, "group_norm")
    assert isinstance(ns.convert(model, "group_norm", inplace=True).bn, nn.GroupNorm)


# --- bake ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_bake_leaves_no_parametrization_and_the_same_function(training: bool) -> None:
    model = normed().train(training)
    baked = ns.bake(model)
    assert error(in_eval(baked, X), in_eval(model, X)) <= 1e-6
    assert [type(m) for m in baked.modules()] == [type(m) for m in Residual().modules()]
    assert set(baked.state_dict()) == set(Residual().state_dict())
    assert not torch.nn.utils.parametrize.is_parametrized(baked.conv)
    assert torch.nn.utils.parametrize.is_parametrized(model.conv)


def test_bake_keeps_requires_grad_and_ties() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    original = model[0].weight.detach().clone()
    torch.nn.utils.parametrize.register_parametrization(model[0], "weight", Doubled())
    model[0].bias.requires_grad_(False)
    baked = ns.bake(model)
    assert torch.equal(baked[0].weight, 2 * original)
    assert torch.equal(baked[1].weight, original)
    assert baked[0].weight.requires_grad
    assert not baked[0].bias.requires_grad
    model[0].parametrizations.weight.original.requires_grad_(False)
    assert not ns.bake(model)[0].weight.requires_grad
    inplace = ns.bake(model, inplace=True)
    assert inplace is model
    assert torch.equal(model[1].weight, original)


def test_bake_of_a_model_without_parametrizations_does_nothing() -> None:
    model = Residual()
    assert ns.plan(model, Bake()).edits == ()
    assert list(ns.bake(model).state_dict()) == list(model.state_dict())


def test_every_edit_prints() -> None:
    for each in [*PASSES, Bake()]:
        for edit in ns.plan(normed(), each, inputs=X).edits:
            assert str(edit)
            assert isinstance(edit, edits.base.BaseEdit)
