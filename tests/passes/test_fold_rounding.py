"""A fold keeps the range and the digits of a dtype; where it cannot, the BatchNorm stays."""

import copy
import json

import pytest
import torch
from networks import batch_norms, error, in_eval
from torch import Tensor, nn

import normswap as ns
from normswap.core.errors import NormswapError
from normswap.norms.batch.frozen import FixedStatistics
from normswap.passes import Fold
from normswap.passes.edits import FreezeStatistics
from normswap.passes.plan import Plan


def before_a_conv(mean: float, variance: float) -> tuple[nn.Module, Tensor]:
    """A BatchNorm in front of a convolution, and data that have its statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3)).eval()
    _set(model[0], mean, variance)
    return model, torch.randn(2, 4, 6, 6) * variance**0.5 + mean


def after_a_conv(mean: float, variance: float) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).eval()
    with torch.no_grad():
        model[0].weight.mul_(max(variance, 1e-8) ** 0.5)
        model[0].bias.fill_(mean)
    _set(model[1], mean, variance)
    return model, torch.randn(2, 4, 6, 6)


def between_relus(mean: float, variance: float) -> tuple[nn.Module, Tensor]:
    """Nothing folds it in: it can only become a scale and a shift."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU()).eval()
    _set(model[1], mean, variance)
    return model, torch.randn(2, 4, 6, 6) * variance**0.5 + mean


def before_a_batch_norm(mean: float, variance: float) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU()).eval()
    _set(model[1], mean, variance)
    _set(model[2], 0.2, 1.5)
    return model, torch.randn(2, 4, 6, 6) * variance**0.5 + mean


def _set(norm: nn.Module, mean: float, variance: float) -> None:
    norm.running_mean.fill_(mean)
    norm.running_var.fill_(variance)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)


CASES = [before_a_conv, after_a_conv, between_relus, before_a_batch_norm]
NUMBERS = [(500.0, 0.0), (1e6, 1.0), (-100.0, 1e-4), (10.0, 1.0)]
# What an error may grow by: numbers that cancel may be 8 times as large as their result in 16 bits.
GROWTH = {torch.float32: 10, torch.float16: 8, torch.bfloat16: 8}


@pytest.mark.parametrize("dtype", GROWTH, ids=str)
@pytest.mark.parametrize(("mean", "variance"), NUMBERS)
@pytest.mark.parametrize("case", CASES)
def test_a_fold_is_about_as_near_to_float64_as_the_original(
    case: object, mean: float, variance: float, dtype: torch.dtype
) -> None:
    model, x = case(mean, variance)  # type: ignore[operator]
    model, x = model.to(dtype), x.to(dtype)
    if not all(b.isfinite().all() for b in model.buffers()):
        pytest.skip("the statistics do not fit into the dtype")
    exact = in_eval(copy.deepcopy(model).double(), x.double())
    if not in_eval(model, x).isfinite().all():
        pytest.skip("the original overflows as well")
    original = error(in_eval(model, x).double(), exact)
    folded = error(in_eval(ns.fold(model, x), x).double(), exact)
    assert folded <= max(GROWTH[dtype] * original, 1e-6)


def test_what_cannot_be_folded_stays_a_batch_norm_with_the_reason() -> None:
    model, x = before_a_conv(500.0, 0.0)
    plan = ns.plan(model.half(), Fold(), inputs=x.half())
    (edit,) = plan.edits
    assert isinstance(edit, FreezeStatistics)
    assert "its mean is 1.2e+05 times as large as what it leaves" in edit.reason
    folded = plan.apply(model)
    assert isinstance(folded[0], FixedStatistics)
    assert torch.equal(in_eval(folded, x.half()), in_eval(model, x.half()))


@pytest.mark.parametrize(
    ("gain", "why"),
    [(1e5, "a weight of 3.1e+05 does not fit into float16"), (1e-6, "lose digits in float16")],
)
def test_a_scale_that_float16_has_no_weights_for_is_left(gain: float, why: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)).half().eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(8, 4, 3, 3))
        model[1].float().weight.fill_(gain)  # in float32, as mixed precision holds it
    reasons = [edit.reason for edit in ns.plan(model, Fold(), inputs=None).edits]
    assert any(why in reason for reason in reasons), reasons


def test_a_shift_that_float16_cannot_hold_is_left() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8)).half().eval()
    model[1].running_mean.fill_(6e4)
    model[1].running_var.fill_(1e-4)
    x = torch.randn(2, 4, 6, 6).half()
    (edit,) = ns.plan(model, Fold(), inputs=x).edits
    assert "a shift of 5.7e+06 does not fit into float16" in edit.reason


def test_two_scales_that_fit_one_by_one_are_not_both_folded() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)).half().eval()
    with torch.no_grad():
        model[0].weight.uniform_(0.5, 1)
        for norm in model[1:]:
            norm.weight.fill_(1e3)
    x = torch.zeros(2, 4, 6, 6).half()
    folded = ns.fold(model, x)
    assert len(batch_norms(folded)) == 1
    assert all(p.isfinite().all() for p in folded.parameters())


def test_a_channel_of_zero_scale_folds() -> None:
    model, x = before_a_conv(0.5, 1.0)
    with torch.no_grad():
        model[0].weight[1] = 0
    folded = ns.fold(model, x)
    assert not batch_norms(folded)
    assert error(in_eval(folded, x), in_eval(model, x)) <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_a_plan_is_checked_against_the_numbers_it_is_applied_to(case: object) -> None:
    fresh, x = case(0.0, 1.0)  # type: ignore[operator]
    trained, _ = case(500.0, 0.0)  # type: ignore[operator]
    plan = ns.plan(fresh.half(), Fold(), inputs=x.half())
    plan = Plan.from_json(json.dumps(json.loads(plan.to_json())))
    trained = trained.half()
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    if case is after_a_conv:  # its bias has the mean, so that nothing large is left
        x = torch.randn(2, 4, 6, 6).half()
        exact = in_eval(copy.deepcopy(trained).double(), x.double())
        assert error(in_eval(plan.apply(trained), x).double(), exact) <= 1e-2
        return
    with pytest.raises(NormswapError, match=r"with the numbers of this model .* plan it anew"):
        plan.apply(trained, inplace=True)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
