"""Recurrent networks of every form, inputs for them, and how to compare what they give."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

RTOL = 1e-9

forms = st.fixed_dictionaries(
    {
        "input_size": st.integers(1, 5),
        "hidden_size": st.integers(2, 6),
        "num_layers": st.integers(1, 2),
        "bias": st.booleans(),
        "batch_first": st.booleans(),
        "bidirectional": st.booleans(),
    }
)


def network(cls: type[nn.RNNBase], form: dict[str, Any], projected: bool = False) -> nn.RNNBase:
    """One of torch's networks in float64, with weights that do something."""
    options = {"proj_size": form["hidden_size"] - 1} if projected else {}
    made = cls(**form, **options).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.7)
    return made


def stirred(module: nn.Module) -> nn.Module:
    """With gains and biases that are not what they start from."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith(("gain", "bias_c")):
                parameter.add_(torch.rand_like(parameter))
    return module


def sequence(module: nn.RNNBase, kind: str, lengths: Sequence[int] = (3, 5, 1, 3)) -> Any:
    """An input: "batch", "unbatched" or "packed"."""
    sequences = [torch.randn(n, module.input_size, dtype=torch.float64) for n in lengths]
    if kind == "packed":
        packed = pack_sequence(sequences, enforce_sorted=False)
        return packed._replace(data=packed.data.requires_grad_())
    if kind == "unbatched":
        return sequences[0].requires_grad_()
    shape = (len(lengths), 5) if module.batch_first else (5, len(lengths))
    return torch.randn(*shape, module.input_size, dtype=torch.float64, requires_grad=True)


def start(module: nn.RNNBase, kind: str, batch: int = 4) -> Any:
    """A start state for the input `kind`."""
    layers = module.num_layers * (2 if module.bidirectional else 1)
    middle = () if kind == "unbatched" else (batch,)
    h = torch.randn(layers, *middle, module.proj_size or module.hidden_size).double()
    if module.mode != "LSTM":
        return h.requires_grad_()
    c = torch.randn(layers, *middle, module.hidden_size).double()
    return h.requires_grad_(), c.requires_grad_()


def flat(value: Any) -> list[Tensor]:
    """The tensors of an input, output or state."""
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, (tuple, list)):
        return [tensor for each in value for tensor in flat(each)]
    return [] if value is None else [value]


def results(module: Callable[..., Any], x: Any, hx: Any, weights: Sequence[Tensor]) -> list[Tensor]:
    """Output, last state, and the gradients of input, start state and weights."""
    outputs = flat(module(x, hx))
    generator = torch.Generator().manual_seed(3)
    loss = sum(
        (torch.randn(o.shape, generator=generator).to(o.dtype) * o.square()).sum() for o in outputs
    )
    grads = torch.autograd.grad(loss, [*flat(x), *flat(hx), *weights], allow_unused=True)
    return [*outputs, *(torch.zeros(1) if g is None else g for g in grads)]


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor], rtol: float = RTOL) -> None:
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert a.dtype == e.dtype
        torch.testing.assert_close(a, e, rtol=rtol, atol=rtol)


def by_steps(
    module: nn.RNNBase, step: Callable[..., tuple[Tensor, ...]], x: Any, hx: Any
) -> tuple[Any, Any]:
    """A network written sequence by sequence, step by step, from the formula of one step.

    `step(suffix, k, x, state) -> state` of one sequence, where k counts the steps from the start
    of the direction.
    """
    packed = isinstance(x, PackedSequence)
    if packed:
        padded, lengths = pad_packed_sequence(x, batch_first=True)
        sequences = [padded[b, :n] for b, n in enumerate(lengths)]
    elif x.dim() == 2:
        sequences = [x]
    else:
        sequences = list(x if module.batch_first else x.transpose(0, 1))
    states = flat(hx)
    if not packed and x.dim() == 2:
        states = [each.unsqueeze(1) for each in states]
    outputs, ends = [], []
    for b, rows in enumerate(sequences):
        each_end = []
        for layer in range(module.num_layers):
            both = []
            for direction in range(2 if module.bidirectional else 1):
                index = len(each_end)
                state = tuple(each[index, b] for each in states)
                order = range(len(rows))[::-1] if direction else range(len(rows))
                made = {}
                for k, t in enumerate(order):
                    suffix = f"_l{layer}" + "_reverse" * direction
                    state = step(suffix, k, rows[t], state)
                    made[t] = state[0]
                both.append(torch.stack([made[t] for t in sorted(made)]))
                each_end.append(state)
            rows = torch.cat(both, -1)
        outputs.append(rows)
        ends.append([torch.stack(each) for each in zip(*each_end, strict=True)])
    last = [torch.stack(each, 1) for each in zip(*ends, strict=True)]
    if packed:
        y = pack_sequence(outputs, enforce_sorted=False)
    elif x.dim() == 2:
        y, last = outputs[0], [each.squeeze(1) for each in last]
    else:
        y = torch.stack(outputs, 0 if module.batch_first else 1)
    return y, (tuple(last) if module.mode == "LSTM" else last[0])


def parameters(module: nn.Module) -> list[Tensor]:
    return [parameter for _, parameter in sorted(module.named_parameters())]


def twin(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module)
