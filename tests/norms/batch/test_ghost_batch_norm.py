"""ghost_batch_norm: parts of the batch see nothing of each other."""

import pytest
import torch
from torch import nn

import normswap as ns


@pytest.mark.parametrize("samples", [4, 6, 7, 9])
def test_each_ghost_batch_is_a_batch_of_its_own(samples: int) -> None:
    ghost = ns.create("ghost_batch_norm", 3, ghost_batch_size=4).double()
    plain = nn.BatchNorm2d(3).double()
    x = torch.randn(samples, 3, 2, 2, dtype=torch.float64)
    expected = torch.cat([plain(part) for part in x.split(4)])
    torch.testing.assert_close(ghost(x), expected)
    torch.testing.assert_close(ghost.state_dict(), plain.state_dict())


def test_a_sample_feels_only_its_ghost_batch() -> None:
    ghost = ns.create("ghost_batch_norm", 3, ghost_batch_size=2)
    x = torch.randn(5, 3, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(ghost(x)[2].square().sum(), x)
    assert [bool(sample.any()) for sample in gradient] == [False, False, True, True, False]


@pytest.mark.parametrize(("samples", "size"), [(5, 4), (4, 1)])
def test_a_ghost_batch_of_one_value_is_refused_before_anything_changes(
    samples: int, size: int
) -> None:
    ghost = ns.create("ghost_batch_norm", 3, ghost_batch_size=size)
    with pytest.raises(ValueError, match="ghost_batch_size"):
        ghost(torch.randn(samples, 3))
    assert ghost.num_batches_tracked == 0
    assert ghost(torch.randn(samples, 3, 2)).shape == (samples, 3, 2)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ns.NormswapError, match="at least 1"):
        ns.create("ghost_batch_norm", 3, ghost_batch_size=0)
