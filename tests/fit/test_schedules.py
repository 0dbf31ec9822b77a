"""A growing rate without weight decay computes what a constant one with it does."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from normswap import NormswapError
from normswap.fit.schedules import exponential_lr


class ScaleInvariant(nn.Module):
    """Every weight that trains is followed by a normalization without gain; the head is fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.hidden = nn.Conv2d(2, 6, 3, bias=False), nn.Linear(24, 8, bias=False)
        self.register_buffer("head", torch.randn(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        # eps would tell a long weight from a short one.
        x = F.batch_norm(self.conv(x), None, None, training=True, eps=1e-30).relu().flatten(1)
        x = F.batch_norm(self.hidden(x), None, None, training=True, eps=1e-30)
        return x @ self.head


@settings(max_examples=8, deadline=None)
@given(
    lr=st.floats(0.01, 0.5),
    weight_decay=st.floats(0.0, 0.02),
    momentum=st.sampled_from([0.0, 0.5, 0.8]),
    seed=st.integers(0, 100),
)
def test_both_runs_are_the_same_function_at_every_step(
    lr: float, weight_decay: float, momentum: float, seed: int
) -> None:
    torch.manual_seed(seed)
    decayed = ScaleInvariant().double()
    grown = copy.deepcopy(decayed)
    schedule = exponential_lr(lr, weight_decay, momentum)
    one = torch.optim.SGD(decayed.parameters(), lr, momentum, weight_decay=weight_decay)
    other = torch.optim.SGD(grown.parameters(), schedule.lr, schedule.momentum)
    schedule.start(other)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(other, schedule.gamma)
    for _ in range(12):
        x = torch.randn(16, 2, 4, 4, dtype=torch.float64)
        y = torch.randint(3, (16,))
        outputs = [decayed(x), grown(x)]
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-8, atol=1e-8)
        for optimizer, output in zip((one, other), outputs, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(output, y).backward()
            optimizer.step()
        scheduler.step()


def test_without_the_first_velocity_they_part() -> None:
    """So the check above can fail."""
    torch.manual_seed(0)
    decayed = ScaleInvariant().double()
    grown = copy.deepcopy(decayed)
    schedule = exponential_lr(0.3, 0.02, 0.8)
    one = torch.optim.SGD(decayed.parameters(), 0.3, 0.8, weight_decay=0.02)
    other = torch.optim.SGD(grown.parameters(), schedule.lr, schedule.momentum)
    x, y = torch.randn(16, 2, 4, 4, dtype=torch.float64), torch.randint(3, (16,))
    for model, optimizer in ((decayed, one), (grown, other)):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert (decayed(x) - grown(x)).abs().max() > 1e-4


def test_the_rate_without_momentum_is_the_papers() -> None:
    schedule = exponential_lr(0.1, 0.01)
    assert schedule.lr == pytest.approx(0.1 / 0.999)
    assert schedule.gamma == pytest.approx(0.999**-2)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ((0.0, 0.1, 0.0), "lr 0 must be above 0"),
        ((0.1, -0.1, 0.0), "weight_decay -0.1 not below"),
        ((0.1, 0.1, 1.0), "momentum 1 from 0 to below 1"),
        ((0.5, 0.1, 0.9), "only up to 0.00263"),
        ((1.0, 1.0, 0.0), "only up to 1 equals"),
    ],
)
def test_numbers_without_an_equal_schedule_are_refused(
    numbers: tuple[float, float, float], words: str
) -> None:
    with pytest.raises(NormswapError, match=words):
        exponential_lr(*numbers)
