"""In the place of BatchNorm comes a mean-only one; the scale goes into the weight before."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

import normswap as ns
from normswap.passes.reweight import Reweight
from tests.networks import ConvBN, Residual, error, in_eval, randomise

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return randomise(nn.Sequential(ConvBN(3, 6), ConvBN(6, 8, 2))).double()


@pytest.mark.parametrize("to", ["mean_only_batch_norm", "weight_norm"])
def test_function_in_eval_mode_stays(model: nn.Module, to: str) -> None:
    new = ns.convert(model, to, inputs=X.double())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in new.modules())
    assert error(in_eval(new, X.double()), in_eval(model, X.double())) < 1e-12


@settings(deadline=None, max_examples=13)
@given(
    bias=st.booleans(),
    affine=st.booleans(),
    groups=st.sampled_from([1, 2]),
    transposed=st.booleans(),
    seed=st.integers(0, 100),
)
def test_any_conv_takes_the_scale(
    bias: bool, affine: bool, groups: int, transposed: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    cls = nn.ConvTranspose2d if transposed else nn.Conv2d
    conv = cls(4, 6, 3, groups=groups, bias=bias)
    model = randomise(nn.Sequential(conv, nn.BatchNorm2d(6, affine=affine)), seed).double()
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    new = ns.convert(model, "mean_only_batch_norm", inputs=x)
    assert error(in_eval(new, x), in_eval(model, x)) < 1e-12
    assert (new[0].bias is None) == (not bias), "no bias is made"


def test_training_subtracts_the_mean_of_the_batch(model: nn.Module) -> None:
    """Salimans & Kingma 2016, section 4: t = w x, t - mean(t) + b, with w = s W."""
    new = ns.convert(model, "mean_only_batch_norm", inputs=X.double()).train()
    conv, bn = model[0].conv, model[0].bn
    scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    t = F.conv2d(X.double(), conv.weight * scale.view(-1, 1, 1, 1), padding=1)
    expected = F.relu(t - t.mean((0, 2, 3), keepdim=True) + bn.bias.view(-1, 1, 1))
    torch.testing.assert_close(new[0](X.double()), expected)


def test_weight_norm_parametrizes_the_weights_that_took_the_scale(model: nn.Module) -> None:
    new = ns.convert(model, "weight_norm", inputs=X.double())
    for block in new:
        assert parametrize.is_parametrized(block.conv, "weight")
        g = block.conv.parametrizations.weight.original0
        norms = block.conv.weight.flatten(1).norm(dim=1)
        torch.testing.assert_close(g.flatten(), norms)
    baked = ns.bake(new)
    assert error(in_eval(baked, X.double()), in_eval(model, X.double())) < 1e-12


def test_a_site_without_a_weight_before_it_is_left_with_the_reason() -> None:
    model = randomise(Residual())
    plan = ns.plan(model, Reweight("mean_only_batch_norm"), inputs=X)
    left = {each.site: each.reason for each in plan.left}
    assert left.keys() == {"after"}
    assert "relu" in left["after"]
    new = plan.apply(model)
    assert error(in_eval(new, X), in_eval(model, X)) < 1e-5


def test_batch_norm_after_batch_norm_stays_exact() -> None:
    """What replaces the first centers the batch, so the second has no weight to go to."""
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    model = randomise(chain).double()
    plan = ns.plan(model, Reweight("mean_only_batch_norm"), inputs=X.double())
    assert [each.site for each in plan.left] == ["2"]
    new = plan.apply(model)
    assert error(in_eval(new, X.double()), in_eval(model, X.double())) < 1e-12


def test_flags_dtype_and_hooks_come_through(model: nn.Module) -> None:
    seen: list[Any] = []
    model[0].bn.register_forward_hook(lambda *_: seen.append("bn"))
    model[0].bn.bias.requires_grad_(False)
    model[0].conv.weight.requires_grad_(False)
    model.eval()
    new = ns.convert(model.half(), "mean_only_batch_norm", inputs=X.half())
    assert not any(module.training for module in new.modules())
    assert not new[0].bn.bias.requires_grad
    assert new[1].bn.bias.requires_grad
    assert not new[0].conv.weight.requires_grad
    assert {p.dtype for p in new.parameters()} == {torch.float16}
    seen.clear()
    new(X.half())
    assert seen == ["bn"]


def test_plan_survives_json_and_saving(model: nn.Module, tmp_path: Any) -> None:
    plan = ns.plan(model, Reweight("weight_norm"), inputs=X.double())
    again = ns.Plan.from_json(plan.to_json())
    assert again == plan
    new = again.apply(model)
    ns.save(new, tmp_path / "out")

    def source() -> nn.Module:
        return nn.Sequential(ConvBN(3, 6), ConvBN(6, 8, 2))

    loaded = ns.load(tmp_path / "out", source=source)
    torch.testing.assert_close(in_eval(loaded, X.double()), in_eval(new, X.double()))


def test_one_training_step_moves_both_gain_and_direction(model: nn.Module) -> None:
    new = ns.convert(model, "weight_norm", inputs=X.double()).train()
    optimizer = torch.optim.SGD(new.parameters(), lr=0.1)
    before = {name: p.detach().clone() for name, p in new.named_parameters()}
    loss: Tensor = new(X.double()).square().mean()
    loss.backward()
    optimizer.step()
    unmoved = [n for n, p in new.named_parameters() if torch.equal(p, before[n])]
    assert unmoved == []


def test_without_inputs_a_symbolic_trace_is_enough() -> None:
    torch.manual_seed(0)
    model = randomise(nn.Sequential(ConvBN(3, 6))).double()
    new = ns.convert(model, "mean_only_batch_norm")
    assert error(in_eval(new, X.double()), in_eval(model, X.double())) < 1e-12


def test_frozen_by_tune_mode_is_left_with_the_remedy(model: nn.Module) -> None:
    tuned = ns.freeze(model, X.double(), mode="tune")
    plan = ns.plan(tuned, Reweight("mean_only_batch_norm"), inputs=X.double())
    assert not plan.edits
    assert all("unfreeze" in each.reason for each in plan.left)


def test_the_plan_prints_what_comes_and_where_the_scale_goes(model: nn.Module) -> None:
    row = next(
        line
        for line in str(ns.plan(model, Reweight("weight_norm"), inputs=X.double())).splitlines()
        if line.startswith("0.bn")
    )
    assert "mean_only_batch_norm; weight_norm of weight" in row
    assert "moves into 0.conv" in row


def test_a_plan_objects_to_what_the_weights_method_objects_to() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with pytest.raises(ns.NormswapError, match="dim=7 is none of them"):
        ns.plan(model, Reweight("weight_norm", dim=7), inputs=torch.randn(2, 3, 4, 4))
