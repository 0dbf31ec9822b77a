"""Layer normalization inside recurrent networks: Ba, Kiros & Hinton 2016 (arXiv 1607.06450).

Statistics are those of one sample at one time step. With LN(a; gain, bias) = gain * (a - mean(a))
/ sqrt(var(a) + eps) + bias, W_x = weight_ih, W_h = weight_hh, and torch's order of the gates:

    LSTM (supplement, eq. 20-22)   i, f, g, o = LN(W_x x; gain_ih, bias_ih)
                                              + LN(W_h h; gain_hh, bias_hh)
                                   c' = sigma(f) * c + sigma(i) * tanh(g)
                                   h' = sigma(o) * tanh(LN(c'; gain_c, bias_c))
    GRU (eq. 29-31)                r, z = LN(W_x x) + LN(W_h h)
                                   n = tanh(LN(W_x x) + sigma(r) * LN(W_h h))
                                   h' = (1 - sigma(z)) * n + sigma(z) * h
    RNN (eq. 4)                    h' = tanh(LN(W_x x + W_h h; gain, bias_ih + bias_hh))

The paper's one more bias of the LSTM is in the two that torch has; its GRU's z is torch's 1 - z,
whose weights are taken over. One LN in these lines has the statistics of all gates on its left, and
a gain for every number, so each gate has its own gains; `per_gate` gives it its own statistics too.
A projection (LSTM with proj_size) is of h', as torch's.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.norms.recurrent import per_sample
from normswap.norms.recurrent.fused import Form, layer_norm_lstm, suits
from normswap.norms.recurrent.loop import (
    Norm,
    Outcome,
    State,
    gru_cell,
    linear,
    lstm_cell,
    run_steps,
)
from normswap.norms.recurrent.network import NormalizedRecurrent, arguments, take_over
from normswap.norms.registry import register


class LayerNormRecurrent(NormalizedRecurrent):
    """An RNN, LSTM or GRU with layer normalization in every step.

    Args:
        per_gate: each gate has its own statistics, instead of those of the paper's equations.
    """

    def __init__(self, mode: str, *args: Any, per_gate: bool = False, **kwargs: Any) -> None:
        super().__init__(mode, *args, **kwargs)
        self.per_gate = per_gate
        gates = {"LSTM": (4,), "GRU": (2, 1)}.get(mode, (1,))  # those that share statistics
        gates = (1,) * sum(gates) if per_gate else gates
        self.widths = [number * self.hidden_size for number in gates]
        gated = mode in ("LSTM", "GRU")
        sizes = dict.fromkeys(("gain_ih", "gain_hh") if gated else ("gain",), sum(self.widths))
        if mode == "LSTM":
            names = ("gain_c", "bias_c") if self.bias else ("gain_c",)
            sizes |= dict.fromkeys(names, self.hidden_size)
        self.add_parameters(sizes, gain=1.0)
        per_sample.register(type(self))

    def layer(
        self, suffix: str, x: Tensor, state: State, sizes: Sequence[int] | None, reverse: bool
    ) -> Outcome:
        run = {"LSTM": self._lstm, "GRU": self._gru}.get(self.mode, self._rnn)
        return run(suffix, x, state, sizes, reverse)

    def _lstm(
        self, suffix: str, x: Tensor, state: State, sizes: Sequence[int] | None, reverse: bool
    ) -> Outcome:
        (weight_hr,) = self.tensors(suffix, "weight_hr")

        def loop(
            given: Tensor, state: State, weight_hh: Tensor, gain_hh: Tensor, *of_cell: Tensor
        ) -> Outcome:
            norm, cell_norm = self._norm(gain_hh, None), self._cell_norm(*of_cell)

            def step(state: State, given: Tensor) -> State:
                h, c = state
                return lstm_cell(given + norm(h @ weight_hh.t()), c, cell_norm, weight_hr)

            return run_steps(step, given, (), state, sizes=sizes, reverse=reverse)

        bias_ih, bias_hh = self.tensors(suffix, "bias_ih", "bias_hh")
        given = self._given(suffix, x, None if bias_ih is None else bias_ih + bias_hh)
        weights = self.tensors(suffix, "weight_hh", "gain_hh", "gain_c", "bias_c")
        if weight_hr is None and suits(given):
            form = Form(loop, self.per_gate, self.eps, sizes, reverse, torch.is_grad_enabled())
            return layer_norm_lstm(form, given, state, *weights)
        return loop(given, state, *weights)

    def _gru(
        self, suffix: str, x: Tensor, state: State, sizes: Sequence[int] | None, reverse: bool
    ) -> Outcome:
        weight, gain = self.tensors(suffix, "weight_hh", "gain_hh")
        bias_ih, bias_hh = self.tensors(suffix, "bias_ih", "bias_hh")
        norm = self._norm(gain, bias_hh)

        def step(state: State, given: Tensor) -> State:
            (h,) = state
            return gru_cell(given, norm(h @ weight.t()), h)

        given = self._given(suffix, x, bias_ih)
        return run_steps(step, given, (), state, sizes=sizes, reverse=reverse)

    def _rnn(
        self, suffix: str, x: Tensor, state: State, sizes: Sequence[int] | None, reverse: bool
    ) -> Outcome:
        weight, gain, bias_ih, bias_hh = self.tensors(
            suffix, "weight_hh", "gain", "bias_ih", "bias_hh"
        )
        norm = self._norm(gain, None if bias_ih is None else bias_ih + bias_hh)
        activation = torch.tanh if self.mode == "RNN_TANH" else torch.relu

        def step(state: State, sums: Tensor) -> State:
            (h,) = state
            return (activation(norm(sums + h @ weight.t())),)

        sums = linear(x, *self.tensors(suffix, "weight_ih"))
        return run_steps(step, sums, (), state, sizes=sizes, reverse=reverse)

    def _given(self, suffix: str, x: Tensor, bias: Tensor | None) -> Tensor:
        """LN(W_x x), of all steps at once."""
        weight, gain = self.tensors(suffix, "weight_ih", "gain_ih")
        return self._norm(gain, bias)(linear(x, weight))

    def _norm(self, gain: Tensor, bias: Tensor | None) -> Norm:
        """LN over the gates that share statistics."""
        if len(self.widths) == 1:
            return lambda sums: F.layer_norm(sums, self.widths, gain, bias, self.eps)

        def norm(sums: Tensor) -> Tensor:
            gains = torch.split(gain, self.widths)
            biases = [None] * len(gains) if bias is None else torch.split(bias, self.widths)
            parts = zip(torch.split(sums, self.widths, -1), gains, biases, strict=True)
            return torch.cat([F.layer_norm(a, g.shape, g, b, self.eps) for a, g, b in parts], -1)

        return norm

    def _cell_norm(self, gain: Tensor, bias: Tensor | None) -> Norm:
        return lambda c: F.layer_norm(c, gain.shape, gain, bias, self.eps)


def _layer_norm_recurrent(
    module: nn.Module, *, eps: float = 1e-5, per_gate: bool = False
) -> nn.Module:
    given = arguments(module, "layer_norm_recurrent")
    return take_over(LayerNormRecurrent(**given, eps=eps, per_gate=per_gate), module)


register(
    "layer_norm_recurrent",
    _layer_norm_recurrent,
    kind="recurrent",
    keeps="calibrated",
    summary="in an RNN, LSTM or GRU: of each sample at each step, with gains for each gate",
    source="Ba et al. 2016, arXiv 1607.06450",
    formula="i, f, g, o = LN(W_x x) + LN(W_h h); c' = sigma(f) c + sigma(i) tanh(g); "
    "h' = sigma(o) tanh(LN(c'))",
    statistics="sample",
    cost="2 passes over the sums of all gates, and 2 over the cell state",
)
