"""A plan made on one state of a model never gives wrong numbers on another."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import normswap as ns
from normswap.passes import Fold, FoldAffine, Freeze
from tests.networks import randomise

X = torch.randn(3, 4, 9, 9, dtype=torch.float64)


def conv(**options: int) -> nn.Module:
    return nn.Conv2d(4, 4, 3, **options)


BETWEEN: dict[str, Callable[[], list[nn.Module]]] = {
    "max pooling": lambda: [nn.ReLU(), nn.BatchNorm2d(4), nn.MaxPool2d(2), conv()],
    "max pooling before": lambda: [conv(), nn.MaxPool2d(2), nn.BatchNorm2d(4), nn.ReLU()],
    "a padded convolution": lambda: [nn.ReLU(), nn.BatchNorm2d(4), conv(padding=1)],
    "padded average pooling": lambda: [
        nn.ReLU(),
        nn.BatchNorm2d(4),
        nn.AvgPool2d(2, padding=1),
        conv(),
    ],
    "no gain": lambda: [nn.ReLU(), nn.BatchNorm2d(4, affine=False), conv(padding=1)],
    "a GroupNorm behind": lambda: [conv(), nn.BatchNorm2d(4), nn.GroupNorm(1, 4), nn.ReLU()],
    "two BatchNorms": lambda: [conv(), nn.ReLU(), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU()],
}


def trained(model: nn.Module) -> None:
    randomise(model, seed=1)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.affine:
            norm.weight.data.mul_(torch.tensor([1.0, -1.0, 2.0, -0.5]))


def loaded(model: nn.Module) -> None:
    state = {
        name: torch.randn_like(value)
        for name, value in model.state_dict().items()
        if value.is_floating_point()
    }
    state |= {name: value.abs() + 0.5 for name, value in state.items() if "running_var" in name}
    model.load_state_dict(state, strict=False)


def reestimated(model: nn.Module) -> None:
    ns.reestimate(model, [X, X * 2 + 1])


@pytest.mark.parametrize("later", [trained, loaded, reestimated])
@pytest.mark.parametrize("layers", BETWEEN.values(), ids=BETWEEN)
def test_a_plan_of_a_fresh_model_is_right_on_another_state_or_refused(
    layers: Callable[[], list[nn.Module]],
    later: Callable[[nn.Module], None],
) -> None:
    model = nn.Sequential(*layers()).double().eval()
    plan = ns.Plan.from_json(ns.plan(model, Fold(), inputs=X).to_json())
    later(model)
    model.eval()
    try:
        folded = plan.apply(model, check=False)
    except ns.NormswapError as error:
        assert "plan it anew" in str(error)
        return
    torch.testing.assert_close(folded(X), model(X), rtol=1e-9, atol=1e-9)


def test_a_plan_of_ordinary_pairs_fits_every_state() -> None:
    model = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv(), nn.BatchNorm2d(4))
    model = model.double().eval()
    plan = ns.plan(model, Fold(), inputs=X)
    trained(model)
    torch.testing.assert_close(plan.apply(model)(X), model(X), rtol=1e-9, atol=1e-9)


def test_a_plan_that_a_zero_bias_decided_is_refused_with_another() -> None:
    norm = nn.GroupNorm(2, 4)
    model = nn.Sequential(conv(), norm, conv(padding=1)).double().eval()
    plan = ns.plan(model, FoldAffine(), inputs=X)
    assert plan.edits
    norm.bias.data.fill_(0.3)
    with pytest.raises(ns.NormswapError, match=r"it has a shift now, .*; plan it anew"):
        plan.apply(model)


def test_tune_mode_asks_for_no_numbers() -> None:
    model = nn.Sequential(*BETWEEN["max pooling before"]()).double().eval()
    plan = ns.plan(model, Freeze("tune"), inputs=X)
    trained(model)
    torch.testing.assert_close(plan.apply(model)(X), model(X), rtol=1e-9, atol=1e-9)


def test_a_saved_model_is_built_again_whatever_numbers_its_source_starts_with(
    tmp_path: object,
) -> None:
    def fresh() -> nn.Module:  # whose last gain is 0, as ResNets start
        model = nn.Sequential(conv(), nn.MaxPool2d(2), nn.BatchNorm2d(4)).double().eval()
        nn.init.zeros_(model[2].weight)
        return model

    model = fresh()
    trained(model)
    model[2].weight.data.abs_()
    folded = ns.fold(model, X)
    ns.save(folded, tmp_path)
    again: nn.Module = ns.load(tmp_path, source=fresh)
    expected: Tensor = folded(X)
    torch.testing.assert_close(again(X), expected)
