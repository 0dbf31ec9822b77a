"""Recurrent networks of a model are replaced by normalized ones, wherever they are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap as ns
from normswap.norms.recurrent.batch_norm import BatchNormLSTM
from normswap.norms.recurrent.layer_norm import LayerNormRecurrent
from normswap.passes.plan import Plan
from normswap.passes.recurrent import ReplaceRecurrent


class Tagger(nn.Module):
    """A convolution over time, two recurrent networks, a Linear on the last output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 5, 3, padding=1)
        self.bn = nn.BatchNorm1d(5)
        self.lstm = nn.LSTM(5, 6, num_layers=2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(12, 4, batch_first=True)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x))).transpose(1, 2)
        x, _ = self.lstm(x)
        x, last = self.gru(x)
        return self.out(x[:, -1]) + self.out(last[0])


class OneLSTM(nn.Module):
    """A convolution over time, an LSTM, a Linear on each output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 5, 3, padding=1)
        self.bn = nn.BatchNorm1d(5)
        self.lstm = nn.LSTM(5, 6, batch_first=True)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(self.bn(self.conv(x)).transpose(1, 2))[0])


X = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))


def test_convert_replaces_every_recurrent_network_and_nothing_else() -> None:
    model = Tagger()
    new = ns.convert(model, "layer_norm_recurrent")
    assert isinstance(new.lstm, LayerNormRecurrent)
    assert isinstance(new.gru, LayerNormRecurrent)
    assert isinstance(new.bn, nn.BatchNorm1d)
    assert type(model.lstm) is nn.LSTM
    assert torch.equal(new.lstm.weight_hh_l1_reverse, model.lstm.weight_hh_l1_reverse)
    new(X).square().sum().backward()
    assert all(parameter.grad is not None for parameter in new.parameters())


def test_flags_dtype_hooks_and_every_path_are_kept() -> None:
    model = Tagger().double()
    model.again = model.lstm
    model.eval()
    model.gru.train()
    model.lstm.bias_hh_l0.requires_grad_(False)
    seen: list[Any] = []
    model.lstm.register_forward_hook(lambda *_: seen.append(1))
    new = ns.convert(model, "layer_norm_recurrent", per_gate=True)
    assert new.again is new.lstm
    assert (new.lstm.training, new.gru.training) == (False, True)
    assert new.lstm.gain_hh_l0.dtype == torch.float64
    assert not new.lstm.bias_hh_l0.requires_grad
    assert new.lstm.per_gate
    new(X.double())
    assert seen == [1]


def test_batch_norm_leaves_what_is_no_lstm_with_the_reason() -> None:
    decided = ns.plan(Tagger(), ReplaceRecurrent("batch_norm_lstm", max_length=9))
    assert decided.changed == ("lstm",)
    assert [(left.site, "not of a GRU" in left.reason) for left in decided.left] == [("gru", True)]
    new = decided.apply(Tagger())
    assert isinstance(new.lstm, BatchNormLSTM)
    assert new.lstm.max_length == 9


def test_include_and_exclude_choose_by_path() -> None:
    for options in ({"include": "l*"}, {"exclude": ["gru"]}):
        new = ns.convert(Tagger(), "layer_norm_recurrent", **options)
        assert isinstance(new.lstm, LayerNormRecurrent)
        assert type(new.gru) is nn.GRU


def test_what_is_normalized_already_is_left() -> None:
    once = ns.convert(Tagger(), "layer_norm_recurrent", include="lstm")
    decided = ns.plan(once, ReplaceRecurrent("layer_norm_recurrent"))
    assert decided.changed == ("gru",)
    assert "already" in decided.left[0].reason


def test_the_plan_survives_json_and_says_what_it_does() -> None:
    decided = ns.plan(Tagger(), ReplaceRecurrent("layer_norm_recurrent", per_gate=True))
    again = Plan.from_json(decided.to_json())
    assert again == decided
    assert "layer_norm_recurrent" in str(decided)
    new = again.apply(Tagger())
    assert new.gru.per_gate


def test_a_plan_for_another_model_changes_nothing() -> None:
    decided = ns.plan(Tagger(), ReplaceRecurrent("layer_norm_recurrent"))
    other = Tagger()
    other.gru = nn.Linear(12, 4)
    with pytest.raises(ns.NormswapError, match="another model"):
        decided.apply(other, inplace=True)
    assert type(other.lstm) is nn.LSTM


@pytest.mark.parametrize(
    ("model", "to", "options", "words"),
    [
        (Tagger(), "layer_norm_recurrent", {"include": "rnn*"}, "matches none of the 2.*lstm, gru"),
        (Tagger(), "layer_norm_recurrent", {"groups": 2}, "no option 'groups'"),
        (Tagger(), "batch_norm_lstm", {"include": "gru"}, "nothing to replace: .*not of a GRU"),
        (Tagger(), "batch_norm_lstm", {"max_length": 0}, "at least 1"),
        (nn.LSTM(2, 2), "layer_norm_recurrent", {}, "is the whole model"),
        (nn.Linear(2, 2), "layer_norm_recurrent", {}, "no nn.RNN, nn.LSTM or nn.GRU"),
    ],
)
def test_impossible_requests_are_refused_in_one_line(
    model: nn.Module, to: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ns.NormswapError, match=words) as raised:
        ns.convert(model, to, **options)
    assert "\n" not in str(raised.value)


def test_methods_of_other_kinds_are_refused() -> None:
    with pytest.raises(ns.NormswapError, match="use Replace"):
        ReplaceRecurrent("group_norm")


@pytest.mark.parametrize("to", ["layer_norm_recurrent", "batch_norm_lstm"])
def test_a_converted_model_exports_and_is_found_the_same(to: str, tmp_path: Path) -> None:
    new = ns.convert(OneLSTM(), to)
    new(torch.randn(4, 3, 7))
    report = ns.export(new.eval(), X, tmp_path / "model.onnx")
    assert report.passed, report
    assert report.dynamic


def test_a_converted_model_can_be_changed_further() -> None:
    """The scan in a captured graph is no obstacle to folding what stands beside it."""
    new = ns.convert(OneLSTM(), "layer_norm_recurrent").eval()
    folded = ns.fold(new, X)
    assert isinstance(folded.bn, nn.Identity)
    assert torch.allclose(folded(X), new(X), atol=1e-5)


def test_weights_that_networks_share_stay_shared() -> None:
    model = nn.ModuleList([nn.LSTM(3, 3), nn.LSTM(3, 3)])
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    new = ns.convert(model, "layer_norm_recurrent")
    assert new[0].weight_hh_l0 is new[1].weight_hh_l0
    assert new[0].weight_hh_l0 is not model[0].weight_hh_l0
    assert new[0].weight_ih_l0 is not new[1].weight_ih_l0
