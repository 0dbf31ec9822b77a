"""mean_only_batch_norm: only the mean goes, and nothing is kept for backward."""

import torch
from torch import Tensor

import normswap as ns


def test_the_scale_stays() -> None:
    x = 5 * torch.randn(64, 3, 10) + 2
    y = ns.create("mean_only_batch_norm", 3)(x)
    torch.testing.assert_close(y.std((0, 2)), x.std((0, 2)))
    torch.testing.assert_close(y.mean((0, 2)), torch.zeros(3), atol=1e-5, rtol=0)


def test_nothing_of_the_input_is_kept_for_backward() -> None:
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ns.create("mean_only_batch_norm", 3)(x)
    assert all(t.numel() <= 3 for t in kept)


def test_its_state_is_a_batch_norms_without_the_scale() -> None:
    state = ns.create("mean_only_batch_norm", 3).state_dict()
    assert list(state) == ["bias", "running_mean", "num_batches_tracked"]
