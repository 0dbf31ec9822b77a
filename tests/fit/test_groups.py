"""The number of groups chosen is the one whose calibrated GroupNorm is nearest to the original."""

import copy

import pytest
import torch
from torch import Tensor, nn

from normswap.core.errors import NormswapError
from normswap.fit.calibrate import calibrate
from normswap.fit.groups import group_errors


def chosen(teacher: nn.Module, sites, data, **options) -> dict[str, int]:
    """The number with the least error, for each site."""
    errors = group_errors(teacher, sites, data, **options)
    return {site: min(each, key=each.__getitem__) for site, each in errors.items()}


def _norm(channels: int = 8) -> nn.BatchNorm2d:
    """A BatchNorm as after training, with gains of both signs."""
    norm = nn.BatchNorm2d(channels)
    nn.init.normal_(norm.weight, 0.2, 1.0)
    nn.init.normal_(norm.bias)
    norm.running_mean.normal_(0, 0.3)
    norm.running_var.uniform_(0.3, 2.0)
    return norm.double().eval()


def _standardized(x: Tensor, groups: int) -> Tensor:
    parts = x.unflatten(1, (groups, -1))
    over = (2, 3, 4)
    parts = parts - parts.mean(over, keepdim=True)
    return (parts / parts.std(over, keepdim=True, correction=0)).flatten(1, 2)


def _varied(samples: int = 40, channels: int = 8) -> Tensor:
    """Every channel of every sample has a mean and a deviation of its own."""
    x = torch.randn(samples, channels, 5, 5, dtype=torch.float64)
    scale = torch.rand(samples, channels, 1, 1) + 0.3
    return x * scale + torch.randn(samples, channels, 1, 1)


def test_two_groups_where_each_half_of_the_channels_has_common_statistics() -> None:
    x = _standardized(_varied(), 2)
    # The second half is loud and differs from sample to sample: one group spreads that to the first
    # half, which alone has a gain that counts, and four groups have statistics that differ there.
    x[:, 4:] *= 10 * torch.rand(40, 1, 1, 1) + 1
    norm = _norm()
    norm.weight.data[4:] *= 0.01
    assert chosen(nn.Sequential(norm), {"0": [1, 2, 4]}, x.split(7)) == {"0": 2}


def test_one_group_where_only_all_channels_together_have_common_statistics() -> None:
    x = _standardized(_varied(), 1)
    assert chosen(nn.Sequential(_norm()), {"0": [4, 2, 1]}, [x]) == {"0": 1}


@pytest.mark.parametrize("seed", range(6))
def test_errors_are_those_of_trying_every_number(seed: int) -> None:
    torch.manual_seed(seed)
    mixing = torch.randn(8, 8, dtype=torch.float64).softmax(0)
    x = torch.einsum("nchw,cd->ndhw", _varied(), mixing) * (torch.rand(8, 1, 1) * 3)
    teacher = nn.Sequential(_norm())
    errors = {}
    for groups in (1, 2, 4):
        student = copy.deepcopy(teacher)
        student[0] = nn.GroupNorm(groups, 8).double()
        calibrate(student, teacher, [x])
        errors[groups] = (student(x) - teacher(x)).square().mean().item()
    variance = teacher(x).var((0, 2, 3), correction=0).mean().item()
    shares = {groups: error / variance for groups, error in errors.items()}
    found = group_errors(teacher, {"0": [1, 2, 4]}, x.split(9))["0"]
    assert found == pytest.approx(shares, rel=1e-6)


def test_all_sites_are_chosen_in_one_sweep_that_leaves_the_teacher_as_it_is() -> None:
    teacher = nn.Sequential(_norm(), nn.ReLU(inplace=True), _norm()).train()
    state = copy.deepcopy(teacher.state_dict())
    generator = torch.get_rng_state()
    read = []

    def batches():
        for batch in _varied().split(10):
            read.append(len(batch))
            yield batch

    found = chosen(teacher, {"0": [1, 2], "2": [1, 2]}, batches(), batches=3)
    assert set(found) == {"0", "2"} and read == [10, 10, 10]
    assert all(module.training and not module._forward_hooks for module in teacher.modules())
    assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


def test_features_without_positions_have_groups_too() -> None:
    norm = nn.BatchNorm1d(8).eval()
    x = torch.randn(50, 8)
    assert chosen(nn.Sequential(norm), {"0": [1, 4]}, [x])["0"] in (1, 4)


@pytest.mark.parametrize(
    "sites, data, words",
    [
        ({"0": [1]}, [], "no batch"),
        ({"0": [3]}, [_varied(4)], "8 channels, which 3 groups do not divide"),
        ({"0": []}, [_varied(4)], "'0' has no number of groups"),
        ({"0": [1]}, [_varied(4) * float("inf")], "'0': the activations there are not finite"),
        ({"0": [1]}, [_varied(4)[:, :5]], "does not run on an input of"),
    ],
)
def test_unusable_requests_are_refused(sites, data, words: str) -> None:
    with pytest.raises(NormswapError, match=words):
        group_errors(nn.Sequential(_norm()), sites, data)
