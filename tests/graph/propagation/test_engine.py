"""Movements through several operators at once: patterns that once went wrong or were missed."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import error, in_eval, randomise
from torch import Tensor, nn

import normswap as ns
from normswap.passes import Fold


class Net(nn.Module):
    """Some layers, used as `how` says."""

    def __init__(self, how: Callable[["Net", Tensor], Tensor | tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 1) for _ in range(3))
        self.one = nn.Conv2d(1, 4, 1)
        self.bn, self.bn2, self.single = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(1)
        self.gain = nn.Parameter(torch.randn(4, 1, 1))
        self.table = torch.tensor([2, 0, 3, 1])  # no buffer
        self.how = how

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.how(self, x)


def gone(how: Callable[[Net, Tensor], Tensor | tuple[Tensor, ...]]) -> set[str]:
    """The BatchNorms that a fold removes; it computes the same."""
    model = randomise(Net(how).double())
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    # The network holds BatchNorms that the forward does not call.
    plan = ns.plan(model, Fold(assume_example=True), inputs=x)
    actual, expected = in_eval(plan.apply(model), x), in_eval(model, x)
    if isinstance(actual, Tensor):
        actual, expected = (actual,), (expected,)
    for mine, theirs in zip(actual, expected, strict=True):
        assert error(mine, theirs) <= 1e-10
    return {edit.site for edit in plan.edits if edit.effect == "removes"}


def _shared(m: Net, x: Tensor) -> tuple[Tensor, ...]:
    y = m.a(x)
    return m.bn(y), m.a(y)


def test_a_layer_that_is_called_before_and_after_does_not_fold_in_on_both_sides() -> None:
    assert gone(_shared) == set()


def _residual(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.bn(y + m.b(F.max_pool2d(y, 3, 1, 1)))


def test_a_layer_between_two_values_that_change_folds_in_on_both_sides() -> None:
    assert gone(_residual) == {"bn"}


def _chain(m: Net, x: Tensor) -> tuple[Tensor, ...]:
    y = m.a(x)
    return m.bn2(m.bn(y)), m.b(y)


def test_two_batch_norms_in_a_row_fold_while_another_layer_takes_both_back() -> None:
    assert gone(_chain) == {"bn", "bn2"}


def _one_channel(m: Net, x: Tensor) -> tuple[Tensor, ...]:
    y = m.a(x)
    return m.single(y[:, :1]), F.gelu(y[:, 1:])


def _one_channel_after(m: Net, x: Tensor) -> Tensor:
    return m.one(m.bn(x)[:, 2:3])


def _one_part(m: Net, x: Tensor) -> tuple[Tensor, ...]:
    parts = m.a(x).split(1, 1)
    return m.single(parts[2]), F.gelu(parts[0])


@pytest.mark.parametrize(
    ("how", "site"), [(_one_channel, "single"), (_one_channel_after, "bn"), (_one_part, "single")]
)
def test_a_single_channel_of_a_value_moves_alone(
    how: Callable[[Net, Tensor], Tensor], site: str
) -> None:
    assert gone(how) == {site}


@pytest.mark.parametrize(
    "operator",
    [
        lambda m, x: x[:, [2, 0, 3, 1]],
        lambda m, x: x[:, m.table],
        lambda m, x: x[:, torch.arange(4).flip(0)],
        lambda m, x: x.index_select(1, torch.tensor([1, 0, 2, 3])),
        lambda m, x: torch.stack([x[:, 0], x[:, 2], x[:, 1], x[:, 3]], 1),
        lambda m, x: x.view(2, 2, 2, 4, 4).transpose(1, 2).flatten(1, 2),
        lambda m, x: torch.cat([x[:, :, ::2], x[:, :, 1::2]], 2),
        lambda m, x: x.split([1, 3], 2)[1],
        lambda m, x: x[:, :, 1::2],
        lambda m, x: x + m.gain,
        lambda m, x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    ],
)
@pytest.mark.parametrize("upstream", [True, False])
def test_an_affine_follows_the_elements(operator: Callable[..., Tensor], upstream: bool) -> None:
    def how(m: Net, x: Tensor) -> Tensor:
        return m.bn(operator(m, m.a(x))) if upstream else m.a(operator(m, m.bn(x)))

    assert gone(how) == {"bn"}


def test_an_index_that_is_random_stops_an_affine() -> None:
    model = randomise(Net(lambda m, x: m.bn(m.a(x)[:, torch.randperm(4)])))
    plan = ns.plan(model, Fold(), inputs=torch.randn(2, 4, 4, 4))
    assert "an index that is computed" in plan.edits[0].reason
