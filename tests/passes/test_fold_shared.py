"""A BatchNorm folds in another's affine only where nothing else reads any of its tensors."""

import pytest
import torch
from networks import error, in_eval, randomise
from torch import Tensor, nn

import normswap as ns
from normswap.passes import Fold


class Shared(nn.Module):
    """Two BatchNorms of two features, the first without gain and bias, in some arrangement."""

    def __init__(self, arrangement: str) -> None:
        super().__init__()
        self.arrangement = arrangement
        self.a, self.b = nn.BatchNorm1d(2, affine=False), nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.a, self.b
        if self.arrangement == "called twice":
            return a(x), b(a(x.relu()))
        if self.arrangement == "called twice, before":
            return a(b(x)).relu(), a(x)
        if self.arrangement == "called three times":
            return a(x.relu()) + a(x.abs()), b(a(x))
        if self.arrangement == "mean read":
            return b(a(x)), x - a.running_mean
        if self.arrangement == "variance read":
            return b(a(x)), x * a.running_var
        if self.arrangement == "functional":
            return b(a(x)), nn.functional.batch_norm(x.relu(), a.running_mean, a.running_var)
        if self.arrangement == "mean taken off another":
            return b(x.relu()) - a.running_mean, a(x)
        assert self.arrangement == "bias read"
        return a(b(x)), x - b.bias


ARRANGEMENTS = (
    "called twice",
    "called twice, before",
    "called three times",
    "mean read",
    "variance read",
    "functional",
    "bias read",
    "mean taken off another",
)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_a_batch_norm_that_something_else_reads_takes_up_nothing(arrangement: str) -> None:
    model = randomise(Shared(arrangement).double()).eval()
    x = torch.randn(5, 2, dtype=torch.float64)
    folded = ns.fold(model, x)
    for actual, expected in zip(folded(x), model(x), strict=True):
        assert error(actual, expected) <= 1e-10


class BothSides(nn.Module):
    """`a` normalizes one channel of what `b` takes, and one of what `b` computes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.a, self.b = nn.BatchNorm2d(2), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.a(torch.cat([y[:, :1], self.b(y)[:, 1:]], 1))


def test_a_batch_norm_on_both_sides_of_which_values_change_is_changed_once() -> None:
    model = randomise(BothSides().double()).eval()
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    folded = ns.plan(model, Fold(include="a"), inputs=x).apply(model)
    assert isinstance(folded.a, nn.Identity)
    assert error(folded(x), model(x)) <= 1e-10


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_tune_mode_of_shared_batch_norms_computes_the_same_with_the_same_gradients(
    arrangement: str,
) -> None:
    model = randomise(Shared(arrangement).double()).eval()
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    tuned = ns.freeze(model, x.detach(), mode="tune")
    (expected,) = torch.autograd.grad(sum(each.square().sum() for each in model(x)), x)
    (actual,) = torch.autograd.grad(sum(each.square().sum() for each in tuned(x)), x)
    assert error(actual, expected) <= 1e-10


def test_a_batch_norm_that_only_one_other_takes_is_merged_into_it() -> None:
    model = randomise(nn.Sequential(nn.BatchNorm1d(2, affine=False), nn.BatchNorm1d(2)).double())
    x = torch.randn(5, 2, dtype=torch.float64)
    folded = ns.fold(model, x)
    assert sum(isinstance(each, nn.Identity) for each in folded) == 1
    assert error(in_eval(folded, x), in_eval(model, x)) <= 1e-10


class BesideItsInput(nn.Module):
    """A functional batch norm without gain and bias, of which its input is subtracted."""

    def __init__(self) -> None:
        super().__init__()
        self.stats = nn.BatchNorm2d(2, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.stats.running_mean, self.stats.running_var
        return (nn.functional.batch_norm(x, mean, variance) - x).relu()


def test_a_gain_that_a_batch_norm_is_given_has_the_dtype_that_it_computes_in() -> None:
    """Not that of its count of batches, an integer, which may come first."""
    model = randomise(BesideItsInput().double()).eval()
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    assert error(in_eval(ns.fold(model, x), x), in_eval(model, x)) <= 1e-10


class OnItsOwnOutput(nn.Module):
    """A BatchNorm is called on its own output, and its first input is added."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(2, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (self.bn(self.bn(x)) + x)


def test_branches_do_not_merge_into_a_batch_norm_that_is_called_on_its_own_output() -> None:
    model = randomise(OnItsOwnOutput().double()).eval()
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    assert error(in_eval(ns.fold(model, x), x), in_eval(model, x)) <= 1e-10
