"""The bundled model: what is shipped is what the record says."""

import json
import sys

import pytest
import torch
from torch import nn

from normswap.core.errors import NormswapError
from normswap.demo.digits import RECORD, WEIGHTS, DigitsNet, digits, digits_data


def test_shipped_weights_reach_the_recorded_accuracy_on_the_test_split() -> None:
    record = json.loads(RECORD.read_text())
    x, y = digits_data("test")
    with torch.no_grad():
        right = (digits()(x).argmax(1) == y).double().mean().item()
    assert right == pytest.approx(record["test_accuracy"], abs=0.002)  # one image, for rounding
    assert right >= 0.985
    assert record["test_images"] == len(x)
    assert record["train_images"] == len(digits_data("train")[0])


def test_weights_are_small_enough_to_ship() -> None:
    assert WEIGHTS.stat().st_size <= 500_000


def test_splits_are_disjoint_and_cover_the_data_in_proportion_to_the_classes() -> None:
    from sklearn.datasets import load_digits

    everything = load_digits()
    (train_x, train_y), (test_x, test_y) = digits_data("train"), digits_data("test")
    both = torch.cat([train_x, test_x]).flatten(1) * 16
    shipped = sorted(map(tuple, everything.data.tolist()))
    assert sorted(map(tuple, both.tolist())) == shipped
    share = torch.bincount(test_y) / torch.bincount(torch.cat([train_y, test_y]))
    assert torch.allclose(share, torch.tensor(500 / 1797), atol=0.01)


def test_images_are_in_the_unit_interval_with_their_labels() -> None:
    x, y = digits_data("train")
    assert x.shape[1:] == (1, 8, 8) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert x.min() == 0 and x.max() == 1


def test_it_holds_every_pattern_the_passes_must_meet() -> None:
    model = DigitsNet()
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert any(conv.groups == conv.in_channels > 1 for conv in convs)  # depthwise
    assert isinstance(model.residual.shortcut[0], nn.Conv2d)
    assert model.residual.shortcut[0].kernel_size == (1, 1)
    assert isinstance(model.residual.shortcut[1], nn.BatchNorm2d)
    assert isinstance(model.neck[0], nn.Linear) and isinstance(model.neck[1], nn.BatchNorm1d)


def test_building_it_leaves_the_random_state_and_returns_eval_mode() -> None:
    before = torch.get_rng_state()
    assert not digits().training
    assert torch.equal(torch.get_rng_state(), before)


def test_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(NormswapError, match=r"pip install 'normswap\[demo\]'"):
        digits_data("test")


def test_unknown_split_is_refused() -> None:
    with pytest.raises(NormswapError, match="'train' or 'test'"):
        digits_data("validation")
