"""What cannot be differentiated is refused in one line, and the model stays as it is."""

from typing import Any

import pytest
import torch
from learners import Net, batches
from networks import randomise
from torch import Tensor

import normswap as ns
from normswap.core.errors import NormswapError


class Straight(torch.autograd.Function):
    """Its backward is not written, or fails."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()


class Failing(Straight):
    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise ValueError("no gradient today\nbut two lines")


def distinct(y: Tensor) -> Tensor:
    return y + torch.unique(y)[: len(y), None].mean()


def in_place(y: Tensor) -> Tensor:
    probabilities = y.sigmoid()
    squares = probabilities**2
    probabilities.mul_(2)
    return squares


def hooked(y: Tensor) -> Tensor:
    if y.requires_grad:
        y.register_hook(lambda gradient: 1 / 0)
    return y


ENDS: dict[str, tuple[Any, str]] = {
    "an operator without derivative": (distinct, "the derivative for '_unique2' is not impl"),
    "another": (lambda y: torch.heaviside(y, y.new_zeros(())), "derivative for aten::heaviside"),
    "changed in place": (in_place, "has been modified by an in"),
    "a backward that is missing": (Straight.apply, "You must implement either the backward"),
    "a backward that fails": (Failing.apply, "ValueError: no gradient today; replace"),
    "a hook that fails": (hooked, "ZeroDivisionError: division by zero"),
    "no gradients": (torch.no_grad()(lambda y: y * 1), "the loss depends on no parameter"),
}


class Ending(Net):
    end: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return self.end(super().forward(x))


# recover learns from the states of the blocks where the output lets no gradient through.
@pytest.mark.parametrize(("end", "says"), list(ENDS.values())[:-1], ids=list(ENDS)[:-1])
@pytest.mark.parametrize("steps", [2, 12], ids=["", "with probes of the rate"])
def test_the_reason_is_one_line_of_recover(steps: int, end: Any, says: str) -> None:
    torch.manual_seed(0)
    model = randomise(Ending())
    model.end = end
    student = ns.convert(model, "layer_norm", data=batches())
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(NormswapError, match=says) as refused:
        ns.recover(student, model, batches(), steps=steps, loss="mse")
    assert "\n" not in str(refused.value)
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.parametrize(("end", "says"), ENDS.values(), ids=ENDS)
def test_and_of_finetune(end: Any, says: str) -> None:
    model = randomise(Ending())
    model.end = end
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NormswapError, match=f"batch 1: .*{says}"):
        ns.finetune(model, batches(), steps=2)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
