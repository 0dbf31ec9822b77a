"""The weights and the averages of switchable normalization."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Residual, randomise
from torch import Tensor, nn

import normswap as ns
from normswap.norms.mixed.switchable import SwitchableNorm, averaging

REFERENCES: list[Any] = [
    F.instance_norm,
    lambda x: F.layer_norm(x, x.shape[1:]),
    lambda x: F.batch_norm(x, None, None, training=True),
]


@pytest.mark.parametrize("which", range(3), ids=["instance", "layer", "batch"])
def test_a_weight_of_one_is_that_normalization(which: int) -> None:
    module, x = SwitchableNorm(4).double(), torch.randn(3, 4, 6, 5, dtype=torch.float64) * 3 + 1
    with torch.no_grad():
        for logits in (module.mean_weight, module.var_weight):
            logits.copy_(torch.full((3,), -100.0))
            logits[which] = 100.0
    torch.testing.assert_close(module(x), REFERENCES[which](x))


def test_means_and_variances_have_weights_of_their_own() -> None:
    module, x = SwitchableNorm(4).double(), torch.randn(3, 4, 6, dtype=torch.float64) * 3 + 1
    with torch.no_grad():
        module.mean_weight.copy_(torch.tensor([100.0, -100.0, -100.0]))
        module.var_weight.copy_(torch.tensor([-100.0, -100.0, 100.0]))
    centered = x - x.mean(2, keepdim=True)
    expected = centered / torch.sqrt(x.var((0, 2), correction=0, keepdim=True) + 1e-5)
    torch.testing.assert_close(module(x), expected)


def test_the_paper_starts_with_equal_weights() -> None:
    module = ns.create("switchable_norm", 4)
    for logits in (module.mean_weight, module.var_weight):
        torch.testing.assert_close(logits.softmax(0), torch.full((3,), 1 / 3))


def test_a_swap_starts_on_the_batch() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    swapped = ns.convert(model, "switchable_norm")[1]
    paper = ns.convert(model, "switchable_norm", start="equal")[1]
    for near, equal in zip(
        (swapped.mean_weight, swapped.var_weight),
        (paper.mean_weight, paper.var_weight),
        strict=True,
    ):
        torch.testing.assert_close(near.softmax(0), torch.tensor([0.0005, 0.0005, 0.999]))
        torch.testing.assert_close(equal.softmax(0), torch.full((3,), 1 / 3))


def test_a_swap_deviates_by_what_its_docstring_says() -> None:
    """The stated first-order bound, for means and variances that differ by channel."""
    model = nn.Sequential(randomise(nn.BatchNorm2d(5))).double().eval()
    x = torch.randn(4, 5, 6, 6, dtype=torch.float64)
    x = x * torch.tensor([0.3, 0.6, 1.0, 1.5, 3.0]).view(5, 1, 1) + torch.arange(5.0).view(5, 1, 1)
    old = model[0]

    def column(vector: Tensor) -> Tensor:
        return vector.detach().view(1, -1, 1, 1)

    mu, var, beta = column(old.running_mean), column(old.running_var), column(old.bias)
    shift = 2 * mu - x.mean((2, 3), keepdim=True) - x.mean((1, 2, 3), keepdim=True)
    shift = 0.0005 * shift * column(old.weight) / var.sqrt()
    pooled = x.var((2, 3), correction=0, keepdim=True) + x.var(
        (1, 2, 3), correction=0, keepdim=True
    )
    stated = shift + 0.00025 * (2 - pooled / var) * (model(x) - beta)
    actual = ns.convert(model, "switchable_norm", include="*", inputs=x)(x) - model(x)
    assert (actual - stated).abs().max() <= 0.02 * stated.abs().max()
    assert stated.abs().max() > 1e-3


def test_an_unknown_start_is_refused() -> None:
    with pytest.raises(ns.NormswapError, match="should be 'equal' or 'batch'"):
        ns.create("switchable_norm", 4, start="layer")
    with pytest.raises(ns.NormswapError, match="should be 'equal' or 'batch', not 'layer'"):
        SwitchableNorm(4, start="layer")


def test_averaging_takes_the_mean_of_the_batches_and_nothing_else_changes() -> None:
    first, second = SwitchableNorm(3).double(), SwitchableNorm(3).double()
    model = nn.Sequential(first, nn.BatchNorm1d(3), nn.Dropout(), second).double()
    batches = [torch.randn(4, 3, 5, dtype=torch.float64) * 2 + 1 for _ in range(3)]
    for x in batches:
        model(x)  # training, with a moving average
    model.eval()
    parameters = [p.clone() for p in model.parameters()]
    plain = {k: v.clone() for k, v in model[1].state_dict().items()}
    with averaging(model):
        outputs = [model(x) for x in batches]
    means = torch.stack([x.mean((0, 2)) for x in batches]).mean(0)
    variances = torch.stack([x.var((0, 2)) for x in batches]).mean(0)
    torch.testing.assert_close(first.running_mean, means)
    torch.testing.assert_close(first.running_var, variances)
    assert first.num_batches_tracked == len(batches)
    assert not any(y.requires_grad for y in outputs)
    assert not any(module.training for module in model.modules())
    assert (first.momentum, second.momentum) == (0.1, 0.1)
    torch.testing.assert_close([*model.parameters()], parameters)
    torch.testing.assert_close(dict(model[1].state_dict()), plain)


def test_averaging_restores_the_modes_after_an_error() -> None:
    norm = SwitchableNorm(3).eval()
    with pytest.raises(ValueError, match="expected"), averaging(norm):
        norm(torch.randn(3))
    assert not norm.training
    assert norm.momentum == 0.1


def test_momentum_none_averages_over_training() -> None:
    module = SwitchableNorm(3, momentum=None).double()
    batches = [torch.randn(4, 3, 5, dtype=torch.float64) for _ in range(3)]
    for x in batches:
        module(x)
    torch.testing.assert_close(
        module.running_mean, torch.stack([x.mean((0, 2)) for x in batches]).mean(0)
    )


def test_large_means_do_not_cancel() -> None:
    module, x = SwitchableNorm(3), torch.randn(4, 3, 8, 8, dtype=torch.float64) + 1e4
    exact = SwitchableNorm(3).double()(x)
    assert (module(x.float()) - exact).abs().max() < 1e-2


def test_a_step_moves_both_weights_of_a_converted_network() -> None:
    """From the start on the batch too, where the softmax is nearly flat."""
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    model = ns.convert(randomise(Residual()).double(), "switchable_norm", inputs=x).train()
    before = [weight.detach().clone() for weight in (model.bn.mean_weight, model.bn.var_weight)]
    model(x).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for weight, start in zip((model.bn.mean_weight, model.bn.var_weight), before, strict=True):
        assert (weight != start).all()
