"""Signal-to-noise of sites, against NumPy and by hand."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.report.outputs import SiteOutput, signal_to_noise

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    return model


def found(original: nn.Module, changed: nn.Module, *sites: str) -> dict[str, float | None]:
    return {each.site: each.snr_db for each in signal_to_noise(original, changed, X, sites)}


def test_it_is_that_of_numpy_before_what_follows_works_in_place():
    model = network()
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed[1].bias += 0.3
        a, b = (each[:2].eval()(X).numpy().astype(np.float64) for each in (model, changed))
    expected = 10 * np.log10((a**2).sum() / ((a - b) ** 2).sum())
    assert found(model, changed, "1")["1"] == pytest.approx(expected, rel=1e-6)
    assert found(model, changed, "0")["0"] == math.inf


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


@pytest.mark.parametrize(
    ("before", "after", "decibels"),
    [(1.0, 0.9, 20), (1.0, 2.0, 0), (1.0, 11.0, -20), (2.0, 2.0, math.inf), (0.0, 1.0, -math.inf)],
)
def test_an_error_of_a_tenth_is_20_decibels(before, after, decibels):
    assert found(Scale(before), Scale(after))[""] == pytest.approx(decibels, abs=1e-4)


def test_nan_is_nan():
    assert math.isnan(found(Scale(1.0), Scale(math.nan))[""])


def test_a_fold_leaves_rounding_at_every_site():
    model = network()
    levels = found(model, normswap.fold(model, X), "1")
    assert levels.keys() == {"1", ""} and min(levels.values()) > 100


class Twice(nn.Module):
    """Calls one module on its input and on what came of it."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.scale = Scale(factor)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.scale(x))


def test_all_calls_of_a_module_count():
    # The outputs are 2x and 4x, and 3x and 9x: 10 log10((4 + 16) / (1 + 25)).
    assert found(Twice(2.0), Twice(3.0), "scale")["scale"] == pytest.approx(-1.1394, abs=1e-4)


@pytest.mark.parametrize(
    ("changed", "site", "says"),
    [
        (nn.Sequential(Scale(1.0)), "1", "the result calls"),
        (Twice(1.0), "0", "the result calls"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), Scale(1.0)), "0", "another shape"),
    ],
)
def test_what_cannot_be_compared_says_why(changed, site, says):
    original = nn.Sequential(Scale(1.0), Scale(1.0))
    (each, _) = signal_to_noise(original, changed, X, [site])
    assert each.snr_db is None and says in each.note


def test_the_models_are_as_before():
    model, changed = network().train(), network().eval()
    state = copy.deepcopy(model.state_dict())
    signal_to_noise(model, changed, X, ["1"])
    assert model.training and model[1].training and not changed.training
    assert not any(module._forward_hooks for each in (model, changed) for module in each.modules())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("level", [math.inf, -math.inf, 3.25, None])
def test_infinity_survives_the_json(level):
    each = SiteOutput(site="1", snr_db=level)
    assert SiteOutput.model_validate_json(each.model_dump_json()) == each
