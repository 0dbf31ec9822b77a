"""A run that blows up ends with the step, the likely cause, and the last good weights."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from learners import batches, net
from torch import Tensor, nn

import normswap as ns
from normswap.core.errors import NormswapError
from normswap.fit.distill import Guard


class Recorded:
    """`data`, with the weights of `model` at the moment of each batch."""

    def __init__(self, model: nn.Module, data: Iterable[Any]) -> None:
        self.model, self.data = model, list(data)
        self.weights: list[dict[str, Tensor]] = []

    def __iter__(self) -> Any:
        for batch in self.data:
            state = self.model.state_dict().items()
            self.weights.append({name: tensor.clone() for name, tensor in state})
            yield batch


def blown_up(data: Iterable[Any], **options: Any) -> tuple[nn.Module, Recorded, str]:
    model = net()
    recorded = Recorded(model, data)
    with pytest.raises(NormswapError) as error:
        ns.finetune(model, recorded, steps=60, save_every=4, **options)
    return model, recorded, str(error.value)


def has_weights(model: nn.Module, state: dict[str, Tensor]) -> bool:
    """Apart from statistics, which the batch that blew up may have moved."""
    return all(torch.equal(p, state[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("statistics", ["eval", "update"])
def test_a_batch_that_is_not_finite_is_named_and_the_model_is_as_before(statistics: str) -> None:
    bad = [(torch.full((8, 3, 6, 6), torch.nan), batches()[0][1])]
    data = batches()[:4] + batches()[:2] + bad
    model, recorded, said = blown_up(data, statistics=statistics)
    assert said.startswith(
        "batch 7 holds numbers that are not finite, so the loss is nan at step 7"
    )
    before = recorded.weights[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("lr", [30.0, 1e30])
def test_a_rate_that_is_too_high_is_named(lr: float) -> None:
    model, recorded, said = blown_up(batches(), lr=lr, momentum=0.0)
    assert f"the rate {lr:.3g} is likely too high; try a third of it" in said
    step = int(said.rpartition(" ")[2][:-1])
    assert has_weights(model, recorded.weights[1 + step])
    assert step % 4 == 0


def test_a_loss_that_is_never_a_number_is_not_the_rates_fault() -> None:
    def loss(output: Tensor, batch: Any) -> Tensor:
        return output.sum() * float("nan")

    model, recorded, said = blown_up(batches(), loss=loss)
    assert "at step 1: so it is before the first update; check the model's weights" in said
    assert has_weights(model, recorded.weights[0])


def test_a_gradient_that_is_not_finite_spoils_no_weight() -> None:
    """The loss is finite there, so that of the last step says nothing."""

    def loss(output: Tensor, batch: Any) -> Tensor:
        return (output * 0).square().sum().sqrt()  # the slope of a root at 0 is infinite

    for options in ({"steps": 1}, {"steps": 3}):
        model = net()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(NormswapError, match="weights are not finite after step 1"):
            ns.finetune(model, batches(), loss=loss, **options)
        assert has_weights(model, before)


def test_a_single_hard_batch_is_no_explosion() -> None:
    """As label noise makes one, for a model that has learned the rest."""
    model = net()
    hard = 1

    def loss(output: Tensor, batch: Any) -> Tensor:
        nonlocal hard
        hard += 1
        return output.square().mean() * (1e4 if hard == 20 else 1e-3)

    ns.finetune(model, batches(), steps=30, lr=1e-6, loss=loss)


def test_hard_batches_of_one_sample_are_no_explosion() -> None:
    guard = Guard(nn.Linear(2, 2), rate=0.1)
    easy, hard, absurd = 1e-3, 4.0, 50.0
    for step, loss in enumerate([easy] * 5 + [hard] * 5):
        guard.check(loss, step, [], half=False)
    guard.check(absurd, 10, [], half=False)
    guard.check(absurd, 11, [], half=False)
    with pytest.raises(NormswapError, match=r"the loss is 50 .* at step 13: the rate 0\.1"):
        guard.check(absurd, 12, [], half=False)
