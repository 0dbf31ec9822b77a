"""Instance normalization with running statistics."""

import pytest
import torch
from networks import error
from torch import Tensor, nn

import normswap as ns


def test_running_statistics_are_averages_over_samples_and_steps() -> None:
    module = ns.create("instance_norm", 3, momentum=0.2, track_running_stats=True).double()
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    for _ in range(4):
        x = 2 * torch.randn(5, 3, 4, 2, dtype=torch.float64) + 1
        module(x)
        flat = x.flatten(2)
        mean = 0.8 * mean + 0.2 * flat.mean(2).mean(0)
        var = 0.8 * var + 0.2 * flat.var(2, correction=1).mean(0)
    torch.testing.assert_close(module.running_mean, mean)
    torch.testing.assert_close(module.running_var, var)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    shape = (1, 3, 1, 1)
    expected = (x - mean.view(shape)) / torch.sqrt(var.view(shape) + module.eps)
    torch.testing.assert_close(module.eval()(x), expected)


def test_with_running_statistics_one_position_is_enough_in_eval_mode_only() -> None:
    module = ns.create("instance_norm", 3, track_running_stats=True)
    x = torch.randn(2, 3, 1, 1)
    with pytest.raises(ValueError, match="single value"):
        module(x)
    assert error(module.eval()(x), x / (1 + module.eps) ** 0.5) <= 1e-6


def test_with_running_statistics_it_folds() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    x = torch.randn(2, 3, 6, 6)
    converted = ns.convert(model, "instance_norm", inputs=x, track_running_stats=True)
    (site,) = ns.inspect(converted, x).sites
    assert (site.kind, site.statistics) == ("instance", "running")
    converted.eval()
    folded = ns.fold(converted, x)
    assert isinstance(folded[1], nn.Identity)
    assert error(folded(x), converted(x)) <= 1e-5


@pytest.mark.parametrize("affine", [True, False])
def test_it_is_torchs_in_training(affine: bool) -> None:
    ours = ns.create("instance_norm", 6, affine=affine)
    theirs = nn.InstanceNorm2d(6, affine=affine)
    x = torch.randn(4, 6, 7, 5, requires_grad=True)

    def both(module: nn.Module) -> tuple[Tensor, Tensor]:
        y = module(x)
        return y, torch.autograd.grad((y * torch.arange(5.0)).sum(), x)[0]

    for a, b in zip(both(ours), both(theirs), strict=True):
        assert error(a, b) <= 1e-5
