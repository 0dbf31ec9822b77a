"""Accuracy is a count, and counting leaves the model alone."""

import pytest
import torch
from torch import Tensor, nn

from normswap.core.errors import NormswapError
from normswap.fit.evaluate import accuracy

X, Y = torch.randn(20, 4), torch.randint(0, 3, (20,))


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.9), nn.Linear(8, 3))


def _count(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    right = sum(int(model(x[n : n + 1]).argmax() == y[n]) for n in range(len(x)))
    return right / len(x)


def test_it_is_the_share_of_right_answers_over_uneven_batches() -> None:
    model = _model()
    batches = [(X[:13], Y[:13]), (X[13:], Y[13:])]
    measured, limited = accuracy(model, batches), accuracy(model, batches, batches=1)
    assert measured == pytest.approx(_count(model, X, Y))
    assert limited == pytest.approx(_count(model, X[:13], Y[:13]))


def test_model_and_random_state_are_as_before() -> None:
    model = _model()
    model[1].eval()
    state, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    accuracy(model, [(X, Y)])
    assert [module.training for module in model] == [True, False, True, True]
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_flags_come_back_when_the_model_fails() -> None:
    model = _model()
    with pytest.raises(NormswapError, match="does not run on an input of"):
        accuracy(model, [(torch.ones(2, 5), Y[:2])])
    assert all(module.training for module in model.modules())


def test_program_of_torch_export_can_be_measured() -> None:
    model = nn.Linear(4, 3)
    program = torch.export.export(model, (X,)).module()
    assert accuracy(program, [(X, Y)]) == pytest.approx(_count(model, X, Y))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_models_can_be_measured() -> None:
    model = nn.Linear(4, 3)
    assert accuracy(torch.jit.script(model), [(X, Y)]) == pytest.approx(_count(model, X, Y))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([X], "needs labels"),
        ([], "no batch"),
        ([(X, Y[:3])], r"gave \(20, 3\) for labels \(3,\)"),
        ([(X, torch.ones(20, 3))], "class labels"),
    ],
)
def test_data_it_cannot_be_measured_on_are_refused(data: list[object], words: str) -> None:
    with pytest.raises(NormswapError, match=words):
        accuracy(_model(), data)
