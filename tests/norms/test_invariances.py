"""The table of invariances is that of the layer normalization paper, and true of every method."""

from collections.abc import Callable
from inspect import signature

import pytest
import torch
from torch import Tensor

import normswap as ns
from normswap.norms.invariances import CHANGES, invariances

COLUMNS = (
    "weight matrix re-scaling",
    "weight matrix re-centering",
    "weight vector re-scaling",
    "dataset re-scaling",
    "dataset re-centering",
    "single training case re-scaling",
)
# Ba et al. 2016, arXiv 1607.06450, Table 1.
PAPER = {
    "batch_norm": "yes no yes yes yes no",
    "weight_norm": "yes no yes no no no",
    "layer_norm": "yes yes no yes no yes",
}


def normalized(values: Tensor, over: int) -> Tensor:
    return (values - values.mean(over, True)) / values.std(over, correction=0, keepdim=True)


FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "batch_norm": lambda x, w: normalized(x @ w.T, 0),
    "weight_norm": lambda x, w: x @ (w / w.square().sum(1, keepdim=True).sqrt()).T,
    "layer_norm": lambda x, w: normalized(x @ w.T, 1),
}


def changed(column: str, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The changes again, one at a time, with other numbers than the library's."""
    x, w = x.clone(), w.clone()
    if column == "weight matrix re-scaling":
        w *= 0.3
    elif column == "weight matrix re-centering":
        w += torch.randn(1, w.shape[1])
    elif column == "weight vector re-scaling":
        w[5] *= 7
    elif column == "dataset re-scaling":
        x *= 0.3
    elif column == "dataset re-centering":
        x += torch.randn(x.shape[-1])
    elif column == "single training case re-scaling":
        x[2] *= 7
    return x, w


def test_the_columns_are_the_papers() -> None:
    assert tuple(CHANGES) == COLUMNS


@pytest.mark.parametrize("name", PAPER)
def test_rows_of_the_paper_come_out(name: str) -> None:
    stays = invariances(ns.methods()[name])
    assert " ".join("yes" if stays[column] else "no" for column in COLUMNS) == PAPER[name]


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("name", PAPER)
def test_rows_of_the_paper_follow_from_the_formulas(name: str, column: str) -> None:
    x, w = torch.randn(7, 10).double(), torch.randn(9, 10).double()
    stays = torch.allclose(FORMULAS[name](*changed(column, x, w)), FORMULAS[name](x, w))
    assert stays == (PAPER[name].split()[COLUMNS.index(column)] == "yes")


def activations() -> list[str]:
    return [name for name, method in ns.methods().items() if method.kind == "activation"]


@pytest.mark.parametrize("name", activations())
def test_each_verdict_holds_on_other_numbers(name: str) -> None:
    """Other cases, positions, factors and shifts."""
    stays = invariances(ns.methods()[name])
    x, w = torch.randn(40, 24).double(), torch.randn(128, 24).double()
    eps = {"eps": 1e-20} if "eps" in signature(ns.methods()[name].build).parameters else {}

    def outputs(x: Tensor, w: Tensor) -> Tensor:
        return ns.create(name, 128, **eps).double().train()((x @ w.T).movedim(-1, 1))

    try:
        outputs(x, w)
    except ValueError:
        x = torch.randn(40, 7, 24).double()
    before = outputs(x, w)
    for column in COLUMNS:
        deviation = (outputs(*changed(column, x, w)) - before).abs().max() / before.abs().max()
        assert (deviation < 1e-6) == stays[column], (column, deviation)


def test_it_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    invariances(ns.methods()["batch_norm"])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("network", "layer"),
    [("layer_norm_recurrent", "layer_norm"), ("batch_norm_lstm", "batch_norm")],
)
def test_a_step_of_a_network_has_the_invariances_of_its_normalization(
    network: str, layer: str
) -> None:
    assert invariances(ns.methods()[network]) == invariances(ns.methods()[layer])


def test_what_is_fitted_to_the_data_sees_no_change_of_all_of_them() -> None:
    """(x - mean) / std of the data, before a Linear."""
    stays = invariances(ns.methods()["input_norm"])
    assert [column for column in COLUMNS if stays[column]] == [
        "dataset re-scaling",
        "dataset re-centering",
    ]
