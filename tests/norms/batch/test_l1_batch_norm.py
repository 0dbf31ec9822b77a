"""l1_batch_norm: unbiased for a Gaussian, and exact in the place of a BatchNorm of any eps."""

import pytest
import torch
from torch import nn

import normswap as ns
from normswap.norms.batch.l1 import absolute_deviation


def test_a_gaussian_gets_unit_variance() -> None:
    y = ns.create("l1_batch_norm", 2)(7 * torch.randn(1000, 2, 100) + 3)
    torch.testing.assert_close(y.std((0, 2)), torch.ones(2), rtol=0.01, atol=0)


@pytest.mark.parametrize("eps", [1e-8, 1e-5, 0.3])
@pytest.mark.parametrize("var", [0.0, 1e-6, 1.0, 1e4])
def test_conversion_is_exact_for_every_variance_and_eps(eps: float, var: float) -> None:
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3, eps=eps)).double().eval()
    model[1].running_var.fill_(var)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    converted = ns.convert(model, "l1_batch_norm")
    torch.testing.assert_close(converted(x), model(x), rtol=1e-9, atol=1e-9)
    assert converted[1].running_deviation.isfinite().all()


def test_deviation_is_not_hurt_by_a_large_mean() -> None:
    x = torch.randn(8, 2, 500)
    expected = absolute_deviation(x, torch.zeros(2))
    actual = absolute_deviation(x + 1000, torch.full((2,), 1000.0))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=0)


def test_what_code_reads_of_a_batch_norm_is_there() -> None:
    norm, torchs = ns.create("l1_batch_norm", 5).double(), nn.BatchNorm2d(5).double()
    norm.running_deviation.uniform_(0.5, 2)
    for name in ("num_features", "eps", "momentum", "affine", "track_running_stats"):
        assert getattr(norm, name) == getattr(torchs, name), name
    for name in ("running_mean", "running_var", "num_batches_tracked", "weight", "bias"):
        mine, theirs = getattr(norm, name), getattr(torchs, name)
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype), name
    assert not ns.create("l1_batch_norm", 5, affine=False).affine
    x = torch.randn(3, 5, 2, 2, dtype=torch.float64)
    same = nn.functional.batch_norm(x, norm.running_mean, norm.running_var, eps=norm.eps)
    torch.testing.assert_close(norm.eval()(x), same)
