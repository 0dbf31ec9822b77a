"""Batch normalization inside an LSTM: Cooijmans et al. 2016 (arXiv 1603.09025), eq. 6-8.

    i, f, g, o = BN(W_x x; gain_ih) + BN(W_h h; gain_hh) + bias_ih + bias_hh
    c' = sigma(f) * c + sigma(i) * tanh(g)
    h' = sigma(o) * tanh(BN(c'; gain_c, bias_c))

Each step has statistics of its own, over the batch, because the first states differ from the
later ones; a layer that goes backward counts its steps from where it starts. Running statistics
are kept for `max_length` steps, and those of the last serve all later ones (section 3). Gains start
at 0.1, so that tanh does not saturate (section 4). A projection (proj_size) is of h', as torch's.

Of a packed sequence a step's statistics are over the sequences that have that step; where one alone
is left, training uses the running ones too, as a batch of one has none.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.core.errors import NormswapError
from normswap.norms.recurrent.loop import Outcome, State, linear, lstm_cell, run_steps
from normswap.norms.recurrent.network import NormalizedRecurrent, arguments, take_over
from normswap.norms.registry import register

_NORMS = ("ih", "hh", "c")


class BatchNormLSTM(NormalizedRecurrent):
    """An LSTM with batch normalization in every step; arguments as `torch.nn.LSTM`.

    Args:
        max_length: how many steps have running statistics of their own; the length of the longest
            sequence in training is the paper's choice.
        momentum: of the running statistics, as in `torch.nn.BatchNorm1d`.
    """

    def __init__(
        self,
        *args: Any,
        eps: float = 1e-5,
        momentum: float = 0.1,
        max_length: int = 100,
        **kwargs: Any,
    ) -> None:
        super().__init__("LSTM", *args, eps=eps, **kwargs)
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, not {max_length}")
        self.momentum, self.max_length = momentum, max_length
        widths = {"ih": 4 * self.hidden_size, "hh": 4 * self.hidden_size, "c": self.hidden_size}
        vectors = {f"gain_{name}": width for name, width in widths.items()}
        if self.bias:
            vectors["bias_c"] = self.hidden_size
        self.add_parameters(vectors, gain=0.1)
        for suffix in self.suffixes:
            for name, width in widths.items():
                zeros = next(self.parameters()).detach().new_zeros(max_length, width)
                self.register_buffer(f"running_mean_{name}{suffix}", zeros)
                self.register_buffer(f"running_var_{name}{suffix}", torch.ones_like(zeros))

    def layer(
        self, suffix: str, x: Tensor, state: State, sizes: Sequence[int] | None, reverse: bool
    ) -> Outcome:
        if self.training and state[0].shape[0] == 1:
            raise ValueError(
                "batch normalization over a batch of one sequence would erase its input; "
                "give more sequences, or use eval mode"
            )
        weight_ih, weight_hh, weight_hr = self.tensors(
            suffix, "weight_ih", "weight_hh", "weight_hr"
        )
        gain_ih, gain_hh, gain_c = self.tensors(suffix, "gain_ih", "gain_hh", "gain_c")
        bias_ih, bias_hh, bias_c = self.tensors(suffix, "bias_ih", "bias_hh", "bias_c")
        bias = None if bias_ih is None else bias_ih + bias_hh

        def step(state: State, given: Tensor, *rows: Any) -> State:
            h, c = state
            of_ih, of_hh, of_c = rows[0:2], rows[2:4], rows[4:6]
            momentum = rows[6] if self.training else 0.0
            gates = self._norm(given, of_ih, momentum, gain_ih, bias)
            gates = gates + self._norm(h @ weight_hh.t(), of_hh, momentum, gain_hh, None)
            return lstm_cell(
                gates, c, lambda c: self._norm(c, of_c, momentum, gain_c, bias_c), weight_hr
            )

        steps = len(sizes) if sizes is not None else x.shape[0]
        running = self._running(suffix, steps, reverse)
        return run_steps(step, linear(x, weight_ih), running, state, sizes=sizes, reverse=reverse)

    def _norm(
        self, x: Tensor, of: Sequence[Tensor], momentum: float, gain: Tensor, bias: Tensor | None
    ) -> Tensor:
        mean, var = of
        batch = self.training and len(x) > 1
        if self.training and not batch:  # the next batch moves them before this one's backward
            mean, var = mean.clone(), var.clone()
        return F.batch_norm(x, mean, var, gain, bias, batch, momentum, self.eps)

    def _running(self, suffix: str, steps: int, reverse: bool) -> list[Any]:
        """The running means and variances that each step uses, and in training moves."""
        last = self.max_length - 1
        tensors = [
            getattr(self, f"running_{of}_{name}{suffix}")
            for name in _NORMS
            for of in ("mean", "var")
        ]
        if not self.training:
            at = torch.arange(steps, device=tensors[0].device).clamp(max=last)
            return [tensor[at.flip(0) if reverse else at] for tensor in tensors]
        taken = range(steps)[::-1] if reverse else range(steps)
        rows: list[Any] = [[tensor[min(t, last)] for t in taken] for tensor in tensors]
        return [*rows, [self.momentum if t <= last else 0.0 for t in taken]]


def _batch_norm_lstm(
    module: nn.Module, *, eps: float = 1e-5, momentum: float = 0.1, max_length: int = 100
) -> nn.Module:
    given = arguments(module, "batch_norm_lstm")
    if given.pop("mode") != "LSTM":
        raise NormswapError(
            f"batch_norm_lstm takes the place of an nn.LSTM, not of a {type(module).__name__}; "
            "layer_norm_recurrent takes that of any"
        )
    if max_length < 1:
        raise NormswapError(f"max_length must be at least 1, not {max_length}")
    new = BatchNormLSTM(**given, eps=eps, momentum=momentum, max_length=max_length)
    return take_over(new, module)


register(
    "batch_norm_lstm",
    _batch_norm_lstm,
    kind="recurrent",
    keeps="calibrated",
    summary="in an LSTM: over the batch at each step; running statistics for max_length steps",
    source="Cooijmans et al. 2016, arXiv 1603.09025",
    formula="i, f, g, o = BN(W_x x) + BN(W_h h) + b; c' = sigma(f) c + sigma(i) tanh(g); "
    "h' = sigma(o) tanh(BN(c'))",
    statistics="batch",
    cost="2 passes over the sums of all gates, and 2 over the cell state",
)
