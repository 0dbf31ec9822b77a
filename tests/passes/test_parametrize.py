"""Which weights the pass gives a method, and which it leaves, with the reason."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, weight_norm

import normswap as ns
from normswap.passes.parametrize import Parametrize
from normswap.passes.plan import Plan
from tests.networks import Residual, error, in_eval, randomise


class Mixed(nn.Module):
    """A layer of every kind, one under two names and used twice, and a tied one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.depthwise = nn.Conv1d(6, 6, 1, groups=6)
        self.up = nn.ConvTranspose1d(6, 4, 2, 2)
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.up(self.depthwise(self.conv(self.embed(tokens).mT)).relu()).mT
        return self.head(self.norm(self.second(self.first(x).relu())))


TOKENS = torch.arange(10).view(2, 5) % 7


def computed(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if parametrize.is_parametrized(module)}


def reasons(plan: Plan) -> dict[str, str]:
    return {left.site: left.reason for left in plan.left}


def test_every_conv_and_linear_is_parametrized_once_and_a_tied_weight_left() -> None:
    model = randomise(Mixed()).double()
    plan = ns.plan(model, Parametrize("weight_norm"))
    assert plan.changed == ("conv", "depthwise", "up", "first")
    assert list(reasons(plan)) == ["head"]
    assert "tied" in reasons(plan)["head"]
    new = plan.apply(model)
    assert computed(new) == {"conv", "depthwise", "up", "first"}
    assert new.second is new.first
    assert new.head.weight is new.embed.weight
    assert error(in_eval(new, TOKENS), in_eval(model, TOKENS)) < 1e-14
    assert not computed(model)


def test_what_the_method_cannot_treat_is_left_with_its_reason() -> None:
    plan = ns.plan(Mixed(), Parametrize("weight_standardization"))
    assert "erased" in reasons(plan)["depthwise"]
    assert "conv" in plan.changed


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("*", "up", {"conv", "depthwise", "first"}),
        (["co*", "up"], (), {"conv", "up"}),
        ("second", (), {"first"}),  # any name of a module will do
        (None, ["first", "depth*", "up"], {"conv"}),
    ],
)
def test_globs_select_by_path(include: Any, exclude: Any, expected: set[str]) -> None:
    plan = ns.plan(Mixed(), Parametrize("weight_norm", include=include, exclude=exclude))
    assert set(plan.changed) == expected
    assert set(reasons(plan)) == {"conv", "depthwise", "up", "first", "head"} - expected


def test_a_computed_weight_is_left() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    parametrizations.orthogonal(model[0])
    with pytest.warns(FutureWarning):
        weight_norm(model[1])
    model[2].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    plan = ns.plan(model, Parametrize("spectral_norm"))
    assert plan.changed == ("3",)
    assert "parametrized already (_Orthogonal); bake it" in reasons(plan)["0"]
    assert "no parameter" in reasons(plan)["1"]
    assert "int8" in reasons(plan)["2"]


def test_a_second_time_there_is_nothing_to_do_until_it_is_baked() -> None:
    model = ns.plan(nn.Sequential(nn.Linear(4, 4)), Parametrize("weight_norm"))
    model = model.apply(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ns.NormswapError, match="already"):
        ns.plan(model, Parametrize("weight_norm"))
    assert ns.plan(ns.bake(model), Parametrize("weight_norm")).changed == ("0",)


def test_weights_of_a_frozen_batch_norm_are_left() -> None:
    model, x = randomise(Residual()), torch.randn(2, 3, 9, 9)
    tuned = ns.freeze(model, x, mode="tune")
    with pytest.raises(ns.NormswapError, match="FrozenAffineWeight"):
        ns.plan(tuned, Parametrize("weight_norm"))


def test_input_sizes_come_from_the_inputs() -> None:
    model, x = Residual().double().eval(), torch.randn(2, 3, 9, 7, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    plan = ns.plan(model, Parametrize("spectral_norm", conv="operator"), inputs=x)
    sizes = {edit.path: edit.options.get("input_size") for edit in plan.edits}
    assert sizes["first.conv"] == sizes["conv"] == [9, 7]
    assert sizes["fc"] is None
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert error(in_eval(plan.apply(model), x), in_eval(model, x)) < 1e-13


def test_a_convolution_that_the_inputs_do_not_reach_is_left() -> None:
    model = nn.ModuleDict({"used": nn.Conv1d(2, 2, 3), "spare": nn.Conv1d(2, 2, 3)})
    model.forward = lambda x: model["used"](input=x)  # type: ignore[method-assign]
    plan = ns.plan(model, Parametrize("spectral_norm", conv="operator"), inputs=torch.ones(1, 2, 8))
    assert plan.changed == ("used",)
    assert plan.edits[0].options["input_size"] == [8]
    assert "input_size" in reasons(plan)["spare"]


def test_plan_survives_json_and_the_model_saving(tmp_path: Path) -> None:
    model = Residual()
    plan = ns.plan(model, Parametrize("spectral_norm", conv="operator", input_size=9))
    assert Plan.from_json(plan.to_json()) == plan
    new = plan.apply(model).train()
    new(torch.randn(2, 3, 9, 9))
    ns.save(new, tmp_path / "saved")
    loaded = ns.load(tmp_path / "saved", source=Residual)
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(in_eval(loaded, x), in_eval(new, x))


def test_parameters_stay_frozen_or_trained() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)
    new = ns.plan(model, Parametrize("weight_standardization")).apply(model)
    assert not any(p.requires_grad for p in new[0].parametrizations.parameters())
    assert all(p.requires_grad for p in new[1].parametrizations.parameters())


@pytest.mark.parametrize("method", ["weight_norm", "spectral_norm", "weight_standardization"])
def test_a_parametrized_model_learns(method: str) -> None:
    model, x = randomise(Residual()), torch.randn(8, 3, 9, 9)
    new = ns.plan(model, Parametrize(method)).apply(model).train()
    optimizer = torch.optim.SGD(new.parameters(), 0.01)
    losses = []
    for _ in range(10):
        loss = new(x).sub(1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("group_norm", {}, "use convert"),
        ("wieght_norm", {}, "did you mean"),
        ("weight_norm", {"solver": "svd"}, "no option 'solver'"),
        ("weight_norm", {"include": "nothing*"}, "matches none of the 5"),
        ("weight_norm", {"exclude": "*"}, "excluded"),
        ("spectral_norm", {"conv": "operator", "exclude": "first"}, "conv: .*input_size"),
        ("spectral_norm", {"n_power_iterations": 0}, "at least 1"),
    ],
)
def test_bad_requests_name_the_remedy_in_one_line(
    method: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ns.NormswapError, match=words) as raised:
        ns.plan(Mixed(), Parametrize(method, **options))
    assert "\n" not in str(raised.value)


def test_a_model_without_weights_and_inputs_that_do_not_fit_are_told() -> None:
    with pytest.raises(ns.NormswapError, match="none"):
        ns.plan(nn.Sequential(nn.ReLU()), Parametrize("weight_norm"))
    with pytest.raises(ns.NormswapError, match="inputs"):
        ns.plan(
            nn.Sequential(nn.Conv1d(2, 2, 3)),
            Parametrize("spectral_norm", conv="operator"),
            inputs=torch.ones(1, 5, 8),
        )


def test_the_whole_model_may_be_the_layer() -> None:
    layer, x = nn.Linear(4, 3), torch.randn(2, 4)
    new = ns.plan(layer, Parametrize("weight_norm")).apply(layer)
    assert error(new(x), layer(x)) < 1e-6
    assert parametrize.is_parametrized(new)


@pytest.mark.parametrize("training", [True, False])
def test_a_parametrization_is_in_the_mode_of_its_layer(training: bool) -> None:
    layer = ns.parametrize(nn.Sequential(nn.Linear(3, 3)).train(training), "spectral_norm")[0]
    assert layer.parametrizations.weight[0].training == training
