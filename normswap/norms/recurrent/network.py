"""Layers, directions and forms of input of torch's recurrent networks, around one layer's steps.

Everything but a layer in one direction is the same for every normalized network, and the same as
in `torch.nn.RNN`, `LSTM` and `GRU`: their arguments, state-dict keys, inputs and results.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from normswap.core.errors import NormswapError
from normswap.norms.recurrent import per_sample
from normswap.norms.recurrent.loop import Outcome, State

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


class NormalizedRecurrent(nn.RNNBase):
    """A recurrent network that normalizes in every step; a drop-in for torch's of its `mode`.

    Arguments as `torch.nn.LSTM`, after `mode`: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU". A subclass
    says what one layer does in one direction, `layer`, and which parameters of a layer normalize.
    """

    def __init__(self, mode: str, *args: Any, eps: float = 1e-5, **kwargs: Any) -> None:
        self._starts: dict[str, float] = {}
        super().__init__(mode, *args, **kwargs)
        self.eps = eps

    def add_parameters(self, sizes: Mapping[str, int], gain: float) -> None:
        """Give every layer and direction vectors of these names: gains, and biases of zero."""
        for suffix in self.suffixes:
            for name, size in sizes.items():
                start = gain if name.startswith("gain") else 0.0
                vector = next(self.parameters()).detach().new_full((size,), start)
                self.register_parameter(name + suffix, nn.Parameter(vector))
                self._starts[name + suffix] = start

    def reset_parameters(self) -> None:
        """Torch's start for the weights, the paper's for what normalizes."""
        super().reset_parameters()
        for name, start in self._starts.items():
            nn.init.constant_(getattr(self, name), start)

    @property
    def suffixes(self) -> list[str]:
        """What the names of a layer's tensors end in, layer by layer, for each direction."""
        ends = ("", "_reverse") if self.bidirectional else ("",)
        return [f"_l{layer}{end}" for layer in range(self.num_layers) for end in ends]

    def tensors(self, suffix: str, *names: str) -> list[Any]:
        """These tensors of a layer, None for those that it does not have."""
        return [getattr(self, name + suffix, None) for name in names]

    def layer(
        self, suffix: str, x: Tensor, state: State, sizes: Sequence[int] | None, reverse: bool
    ) -> Outcome:
        """One layer in one direction.

        Args:
            suffix: of the names of its tensors.
            x: (T, B, features), or packed (N, features).
            state: (h,) or (h, c), each (B, ...).
            sizes: rows of each step of a packed sequence.
            reverse: from the last step to the first.
        """
        raise NotImplementedError

    def forward(
        self, input: Tensor | PackedSequence, hx: Any = None
    ) -> tuple[Tensor | PackedSequence, Any]:
        if isinstance(input, PackedSequence):
            start = self._start(hx, input.data, int(input.batch_sizes[0]))
            start = tuple(self.permute_hidden(each, input.sorted_indices) for each in start)
            y, end = self._layers(input.data, start, input.batch_sizes.tolist())
            end = tuple(self.permute_hidden(each, input.unsorted_indices) for each in end)
            return input._replace(data=y), self._hidden(end)
        if input.dim() not in (2, 3) or input.shape[-1] != self.input_size:
            raise ValueError(
                f"expected (T, B, {self.input_size}), batches first if batch_first, "
                f"or (T, {self.input_size}); got {tuple(input.shape)}"
            )
        if input.dim() == 2:
            batch_of_one = None if hx is None else _map(hx, lambda each: each.unsqueeze(1))
            y, end = self._layers(
                input.unsqueeze(1), self._start(batch_of_one, input, 1), sizes=None
            )
            return y.squeeze(1), _map(self._hidden(end), lambda each: each.squeeze(1))
        x = input.transpose(0, 1) if self.batch_first else input
        y, end = self._layers(x, self._start(hx, x, x.shape[1]), sizes=None)
        return (y.transpose(0, 1) if self.batch_first else y), self._hidden(end)

    def _layers(self, x: Tensor, start: State, sizes: Sequence[int] | None) -> Outcome:
        if x.shape[0] == 0:
            raise ValueError("expected at least one time step, got none")
        directions = 2 if self.bidirectional else 1
        ends: list[State] = []
        for number in range(self.num_layers):
            outputs = []
            for direction in range(directions):
                index = number * directions + direction
                state = tuple(each[index] for each in start)
                suffix = self.suffixes[index]
                y, end = self.layer(suffix, x, state, sizes, reverse=direction == 1)
                outputs.append(y)
                ends.append(end)
            x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
            if self.dropout and number + 1 < self.num_layers:
                x = F.dropout(x, self.dropout, self.training)
        return x, tuple(map(torch.stack, zip(*ends, strict=True)))

    def _start(self, hx: Any, x: Tensor, batch: int) -> State:
        """The given start state or zeros, as (h,) or (h, c)."""
        layers = self.num_layers * (2 if self.bidirectional else 1)
        sizes = [self.proj_size or self.hidden_size]
        if self.mode == "LSTM":
            sizes.append(self.hidden_size)
        if hx is None:
            return tuple(x.new_zeros(layers, batch, size) for size in sizes)
        given: State = tuple(hx) if self.mode == "LSTM" else (hx,)
        for each, size in zip(given, sizes, strict=True):
            if tuple(each.shape) != (layers, batch, size):
                raise ValueError(
                    f"expected a hidden state ({layers}, {batch}, {size}), layers and directions "
                    f"first, got {tuple(each.shape)}"
                )
        return given

    def _hidden(self, state: State) -> Any:
        per_sample.check_hidden(self, state)
        return state if self.mode == "LSTM" else state[0]

    def extra_repr(self) -> str:
        return f"{self.mode}, {super().extra_repr()}"


def take_over(new: NormalizedRecurrent, old: nn.Module) -> NormalizedRecurrent:
    """Give `new` the weights of `old`, with their dtype and device."""
    weights = [getattr(old, name) for name in new._flat_weights_names]
    new.to(device=weights[0].device, dtype=weights[0].dtype)
    for name, weight in zip(new._flat_weights_names, weights, strict=True):
        taken = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        setattr(new, name, taken)
    return new


def arguments(module: nn.Module, name: str) -> dict[str, Any]:
    """The arguments that make a normalized network with the layers of `module`.

    Raises:
        NormswapError: it is none of torch's recurrent networks; `name` is the method's.
    """
    if not isinstance(module, nn.RNNBase) or module.mode not in GATES:
        raise NormswapError(
            f"{name} takes the place of an nn.RNN, nn.LSTM or nn.GRU, not of a "
            f"{type(module).__name__}"
        )
    named = ("mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout")
    return {each: getattr(module, each) for each in (*named, "bidirectional", "proj_size")}


def _map(hidden: Any, change: Any) -> Any:
    return tuple(map(change, hidden)) if isinstance(hidden, tuple) else change(hidden)
