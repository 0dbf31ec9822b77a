"""A model that is itself one normalization."""

from pathlib import Path
from typing import Any

import pytest
import torch
from networks import randomise
from torch import Tensor, nn

import normswap as ns
from normswap.norms.pointwise.channel_affine import ChannelAffine

X = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)).double()


def _norm(cls: Any = nn.BatchNorm2d) -> nn.Module:
    return randomise(cls(3)).double().eval()


class WithRelu(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(super().forward(x))
        return y


@pytest.mark.parametrize("cls", [nn.BatchNorm2d, WithRelu])
@pytest.mark.parametrize("inplace", [False, True])
def test_fold_leaves_a_scale_and_a_shift(cls: Any, inplace: bool) -> None:
    model = _norm(cls)
    expected, before = model(X), type(model)
    folded = ns.fold(model, X, inplace=inplace)
    assert (folded is model) is inplace
    assert any(isinstance(module, ChannelAffine) for module in folded.modules())
    assert torch.allclose(folded(X), expected, rtol=1e-12, atol=1e-12)
    assert inplace or type(model) is before


def test_plan_goes_to_json_and_back() -> None:
    model = _norm()
    plan = ns.plan(model, ns.Fold(), inputs=X)
    assert "(model)" in str(plan)
    assert "(model)" in str(ns.inspect(model, X))
    again = ns.Plan.from_json(plan.to_json())
    assert torch.allclose(again.apply(model)(X), model(X), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["eval", "tune"])
def test_it_freezes_and_thaws(mode: Any) -> None:
    model = _norm()
    frozen = ns.freeze(model, X, mode=mode).train()
    assert torch.equal(frozen(X), model(X))
    thawed = ns.unfreeze(frozen)
    assert type(thawed) is nn.BatchNorm2d
    assert thawed.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(thawed.eval()(X), model(X))


@pytest.mark.parametrize(
    "to", [name for name, method in ns.methods().items() if method.kind == "activation"]
)
def test_it_becomes_every_method(to: str) -> None:
    model = _norm()
    if to == "mean_only_batch_norm":  # whose scale would go into a layer before it
        with pytest.raises(ns.NormswapError, match="nothing was replaced: the model"):
            ns.convert(model, to, inputs=X)
        return
    changed = ns.convert(model, to, inputs=X)
    assert changed.training is model.training
    assert type(model) is nn.BatchNorm2d
    if ns.methods()[to].keeps == "exact":
        assert torch.allclose(changed(X), model(X), rtol=1e-10, atol=1e-10)
    changed.load_state_dict(changed.state_dict())


def test_a_failed_edit_puts_it_back() -> None:
    model = _norm()
    plan = ns.plan(model, ns.Fold(), inputs=X)
    broken = plan + plan  # the second half finds no BatchNorm any more
    with pytest.raises(ns.NormswapError):
        broken.apply(model, inplace=True)
    assert type(model) is nn.BatchNorm2d
    assert model.running_mean is not None


def test_what_needs_a_layer_refuses_in_one_line() -> None:
    for refused in (
        lambda: ns.parametrize(_norm(), "weight_norm"),
        lambda: ns.absorb_input(_norm(), X, [0.5] * 3, [0.2] * 3),
    ):
        with pytest.raises(ns.NormswapError) as caught:
            refused()
        assert "\n" not in str(caught.value)


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    folded = ns.fold(_norm(), X)
    ns.save(folded, tmp_path / "saved")
    again = ns.load(tmp_path / "saved", source=_norm)
    assert torch.equal(again(X), folded(X))
