"""A normalization whose output is normalized again is removed on request, as far as that is so."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import error, in_eval, randomise
from torch import Tensor, nn

import normswap as ns
from normswap.core.errors import NormswapError
from normswap.passes.redundant import LARGEST_DEVIATION
from tests.passes.redundant_networks import (
    NOT_REDUNDANT,
    REDUNDANT,
    TOKENS,
    TWO,
    Net,
    WrittenOut,
    linear,
    rms,
)


def with_eps(model: nn.Module, eps: float, seed: int = 0) -> nn.Module:
    """A copy with random weights and this eps in all normalizations, in float64."""
    model = randomise(copy.deepcopy(model), seed).double().eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3, generator=generator)
    for module in model.modules():
        for name in ("eps", "variance_epsilon"):
            if name in vars(module):
                setattr(module, name, eps)
    for name, module in model.named_modules():
        # With a bias it is not f(s x) = s f(x) before the last normalization.
        if name in ("norm", "two") and getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
    return model


def with_eps_kept(model: nn.Module) -> nn.Module:
    """A copy in float32 with the weights of `with_eps`."""
    found = copy.deepcopy(model).eval()
    found.load_state_dict(with_eps(model, 0.0).state_dict())
    return found


def apart(actual: Any, expected: Any) -> float:
    """The largest deviation of any output."""
    pairs = (
        [(actual, expected)] if isinstance(actual, Tensor) else zip(actual, expected, strict=True)
    )
    return max(error(a, b) for a, b in pairs)


@pytest.mark.parametrize(("net", "x", "ends"), REDUNDANT.values(), ids=REDUNDANT)
def test_a_redundant_norm_is_named_and_removed(net: nn.Module, x: Tensor, ends: str) -> None:
    model = with_eps(net, 1e-30)
    said = f"all that reads it is normalized again by {ends}"
    plan = ns.plan(model, ns.FoldAffine(include="norm"), inputs=x)
    reasons = [*(edit.reason for edit in plan.edits), *(each.reason for each in plan.left)]
    assert any(said in reason and "(remove_redundant=True" in reason for reason in reasons)
    assert plan.deviation == 0.0

    result = ns.fold_gains(model, x, include="norm", remove_redundant=True)
    assert isinstance(result.norm, nn.Identity)
    assert apart(in_eval(result, x), in_eval(model, x)) <= 1e-12
    gone = {f"norm.{name}" for name, _ in model.norm.named_parameters()}
    assert model.state_dict().keys() - result.state_dict().keys() == gone

    model = with_eps(net, 1e-5)
    plan = ns.plan(model, ns.FoldAffine(include="norm", remove_redundant=True), inputs=x)
    assert ns.Plan.from_json(plan.to_json()) == plan
    assert f"the outputs by {plan.deviation:.2g} of their largest value" in plan.edits[-1].reason
    moved = apart(in_eval(plan.apply(model), x), in_eval(model, x))
    assert 0 < moved <= plan.deviation + 1e-12
    assert plan.deviation <= LARGEST_DEVIATION


@pytest.mark.parametrize(("net", "x"), NOT_REDUNDANT.values(), ids=NOT_REDUNDANT)
def test_what_is_read_otherwise_is_not_redundant(net: nn.Module, x: Tensor) -> None:
    model = randomise(copy.deepcopy(net)).double().eval()
    plan = ns.plan(model, ns.FoldAffine(include="norm", remove_redundant=True), inputs=x)
    reasons = [*(edit.reason for edit in plan.edits), *(each.reason for each in plan.left)]
    assert not any("normalized again" in reason for reason in reasons)
    result = plan.apply(model)
    assert type(result.norm) is type(model.norm)
    assert apart(in_eval(result, x), in_eval(model, x)) <= 1e-10


def projected() -> nn.Module:
    return with_eps(REDUNDANT["a projection"][0], 1e-5)


def test_rows_of_zeros_stay_zeros() -> None:
    model, x = projected(), TOKENS.clone()
    x[0, 2:] = 0
    result = ns.fold_gains(model, x, remove_redundant=True)
    assert isinstance(result.norm, nn.Identity)
    assert not in_eval(result, x)[0, 2:].any()
    assert error(in_eval(result, x), in_eval(model, x)) <= ns.plan_of(result).deviation + 1e-12


def test_where_eps_matters_it_stays_with_the_number() -> None:
    model, x = projected(), 3e-3 * TOKENS  # the mean square is that of eps
    plan = ns.plan(model, ns.FoldAffine(remove_redundant=True), inputs=x)
    (reason,) = {edit.reason for edit in plan.edits if edit.edit == "reset_gain"}
    assert "it stays, though all that reads it is normalized again by last" in reason
    told = float(re.search(r"would move by (\S+) of", reason).group(1))
    without = copy.deepcopy(model)
    without.norm, gain = nn.Identity(), model.norm.weight.detach()
    with torch.no_grad():
        without.fc.weight *= gain
    assert told == pytest.approx(error(in_eval(without, x), in_eval(model, x)), rel=0.1)
    assert told > LARGEST_DEVIATION
    result = plan.apply(model)
    assert type(result.norm) is nn.RMSNorm
    assert error(in_eval(result, x), in_eval(model, x)) <= 1e-12


def test_a_gain_that_cannot_move_keeps_its_norm() -> None:
    net = Net(lambda m, x: m.last(m.norm(x)), norm=rms(), last=rms())
    model = with_eps(net, 1e-5)
    each = ns.FoldAffine(include="norm", remove_redundant=True)
    (left,) = (each for each in ns.plan(model, each, inputs=TOKENS).left if each.site == "norm")
    assert "it is redundant but for its gain" in left.reason
    nn.init.ones_(model.norm.weight)
    plan = ns.plan(model, each, inputs=TOKENS)
    assert [edit.edit for edit in plan.edits] == ["reduce"]
    nn.init.constant_(model.norm.weight, 2.0)
    with pytest.raises(NormswapError, match="plan it anew"):
        plan.apply(model)


def test_a_chain_goes_up_to_its_last_norm() -> None:
    net = Net(
        lambda m, x: m.last(m.b(m.norm2(m.a(m.norm(x))))),
        **{"norm": rms(), "a": linear(), "norm2": rms(), "b": linear(), "last": rms()},
    )
    model = with_eps(net, 1e-5)
    result = ns.fold_gains(model, TOKENS, remove_redundant=True)
    assert isinstance(result.norm, nn.Identity)
    assert isinstance(result.norm2, nn.Identity)
    assert type(result.last) is nn.RMSNorm
    moved = error(in_eval(result, TOKENS), in_eval(model, TOKENS))
    assert 0 < moved <= ns.plan_of(result).deviation + 1e-12
    # Each is measured beside those before it.
    first = ns.fold_gains(model, TOKENS, include="norm", remove_redundant=True)
    step = error(in_eval(result, TOKENS), in_eval(first, TOKENS))
    _, second = (edit for edit in ns.plan_of(result).edits if edit.edit == "reduce")
    assert second.deviation == pytest.approx(step, rel=1e-3)


def test_one_norm_that_is_called_twice_ends_in_another() -> None:
    net = Net(
        lambda m, x: m.last(m.fc(m.norm(m.fc(m.norm(x))))), norm=rms(), fc=linear(), last=rms()
    )
    model = with_eps(net, 1e-30)
    result = ns.fold_gains(model, TOKENS, include="norm", remove_redundant=True)
    assert isinstance(result.norm, nn.Identity)
    assert error(in_eval(result, TOKENS), in_eval(model, TOKENS)) <= 1e-12


def test_a_call_that_the_example_does_not_show_keeps_it() -> None:
    class Chooses(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(self.norm(x))
            return self.last(y) if x.shape[0] < 9 else y

    model = with_eps(Chooses(Net.forward, **TWO), 1e-5)
    result = ns.fold_gains(model, TOKENS, include="norm", remove_redundant=True)
    assert type(result.norm) is nn.RMSNorm
    assumed = ns.fold_gains(
        model, TOKENS, include="norm", remove_redundant=True, assume_example=True
    )
    assert isinstance(assumed.norm, nn.Identity)


def test_a_model_in_bfloat16_is_measured_in_float64() -> None:
    model = projected().to(torch.bfloat16)
    x = TOKENS.to(torch.bfloat16)
    result = ns.fold_gains(model, x, remove_redundant=True)
    assert isinstance(result.norm, nn.Identity)
    assert ns.plan_of(result).deviation <= 1e-4
    assert error(in_eval(result, x), in_eval(model, x)) <= 2e-2


def test_what_was_measured_is_checked_on_other_weights() -> None:
    model = projected()
    plan = ns.plan(model, ns.FoldAffine(remove_redundant=True), inputs=TOKENS)
    with torch.no_grad():
        model.fc.weight *= 1e-4  # what the last normalization takes is as small as its eps
    with pytest.raises(NormswapError, match="where the plan measured"):
        plan.apply(model)


class Called(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (6,))


@pytest.mark.parametrize("last", [nn.RMSNorm(6), Called()], ids=["module", "function"])
def test_an_eps_that_follows_the_type_is_that_of_float32(last: nn.Module) -> None:
    net = nn.Sequential(nn.RMSNorm(8, eps=1e-6), linear(6), last)
    model, x = with_eps_kept(net), 2e-2 * TOKENS.float()
    plan = ns.plan(model, ns.FoldAffine(include="0", remove_redundant=True), inputs=x)
    moved = error(in_eval(plan.apply(model), x), in_eval(model, x))
    assert 1e-5 < moved <= plan.deviation + 2e-6


def test_a_value_that_leaves_float16_keeps_it() -> None:
    model = projected().half()
    with torch.no_grad():
        model.fc.weight *= 300
    x = (300 * TOKENS).half()
    (reason,) = {
        edit.reason
        for edit in ns.plan(model, ns.FoldAffine(remove_redundant=True), inputs=x).edits
        if edit.edit == "reset_gain"
    }
    assert "would move by inf of their largest value on the example in torch.float16" in reason


def test_center_makes_a_layer_norm_redundant() -> None:
    net = Net(
        lambda m, x: m.last(m.fc(m.norm(m.first(x)))),
        **{"first": linear(), "norm": nn.LayerNorm(8, bias=False), "fc": linear(), "last": rms()},
    )
    model = with_eps(net, 1e-30)
    centered = ns.center(model, TOKENS)
    result = ns.fold_gains(centered, TOKENS, remove_redundant=True)
    assert isinstance(result.norm, nn.Identity)
    assert error(in_eval(result, TOKENS), in_eval(model, TOKENS)) <= 1e-12


def test_a_model_that_is_saved_is_loaded_without_it(tmp_path: Path) -> None:
    model = projected()
    result = ns.fold_gains(model, TOKENS, remove_redundant=True)
    ns.save(result, tmp_path / "saved")
    loaded = ns.load(tmp_path / "saved", source=projected)
    assert isinstance(loaded.norm, nn.Identity)
    assert torch.equal(in_eval(loaded, TOKENS), in_eval(result, TOKENS))
    # The class itself, with a gain of 1 where the file has none, computes the same up to eps.
    plain = copy.deepcopy(projected())
    nn.init.ones_(plain.norm.weight)
    assert plain.load_state_dict(result.state_dict(), strict=False).missing_keys == ["norm.weight"]
    assert error(in_eval(plain, TOKENS), in_eval(result, TOKENS)) <= 1e-4


def test_a_functional_call_is_removed_as_well() -> None:
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.last = linear(), rms()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.fc(F.rms_norm(x, (8,), eps=1e-30)))

    model = with_eps(Calls(), 1e-30)
    result = ns.fold_gains(model, TOKENS, remove_redundant=True)
    assert error(in_eval(result, TOKENS), in_eval(model, TOKENS)) <= 1e-12
    assert [m for m in result.modules() if isinstance(m, nn.RMSNorm)] == [result.last]


@st.composite
def drawn(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """RMSNorms of any eps, and inputs of any size, with what commutes with a scale between them."""
    passing = draw(st.sampled_from([nn.Identity(), nn.ReLU(), nn.LeakyReLU(0.3), nn.Dropout()]))
    last = draw(st.sampled_from([rms(6), nn.LayerNorm(6), nn.RMSNorm(6, elementwise_affine=False)]))
    branches = draw(st.integers(1, 3))

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.norm2(m.passing(m.fc(m.norm(x))))
        return m.last(sum(each(y) for each in m.branches))

    net = Net(
        forward,
        norm=rms(),
        fc=linear(),
        passing=passing,
        norm2=draw(st.sampled_from([rms(), WrittenOut()])),
        branches=nn.ModuleList(linear(6) for _ in range(branches)),
        last=last,
    )
    model = with_eps(net, 1e-5, seed=draw(st.integers(0, 99)))
    for module in model.modules():
        if getattr(module, "eps", None) is not None:
            module.eps = draw(st.sampled_from([1e-3, 1e-5, 1e-8, 1e-12]))
    sizes = st.sampled_from([0.0, 1e-4, 1e-2, 1.0, 30.0])
    rows = torch.tensor([[draw(sizes)] for _ in range(10)], dtype=torch.float64)
    return model, TOKENS * rows.view(2, 5, 1)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(drawn())
def test_outputs_move_by_no_more_than_the_plan_says(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    plan = ns.plan(model, ns.FoldAffine(remove_redundant=True), inputs=x)
    removed = {edit.site for edit in plan.edits if edit.edit == "reduce"}
    assert plan.deviation <= LARGEST_DEVIATION * max(len(removed), 1)
    result = plan.apply(model)
    for name in removed:
        assert isinstance(result.get_submodule(name), nn.Identity)
    assert error(in_eval(result, x), in_eval(model, x)) <= plan.deviation + 1e-12
