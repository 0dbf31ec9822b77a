"""Layers, directions, packing and state are torch's: without norms the networks are the same."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrent_cases import assert_same, forms, network, parameters, results, sequence, start
from torch import Tensor, nn

import normswap as ns
from normswap.norms.recurrent.layer_norm import LayerNormRecurrent
from normswap.norms.recurrent.loop import (
    State,
    gru_cell,
    linear,
    lstm_cell,
    product,
    run_steps,
    times,
)
from normswap.norms.recurrent.network import NormalizedRecurrent, arguments, take_over


class Unnormalized(NormalizedRecurrent):
    """The cells and the loop with nothing normalized."""

    def layer(
        self, suffix: str, x: Tensor, state: State, sizes: Sequence[int] | None, reverse: bool
    ) -> tuple[Tensor, State]:
        w_ih, w_hh, w_hr = self.tensors(suffix, "weight_ih", "weight_hh", "weight_hr")
        b_ih, b_hh = (0 if b is None else b for b in self.tensors(suffix, "bias_ih", "bias_hh"))

        def step(state: State, rows: Tensor) -> State:
            recurrent = state[0] @ w_hh.t() + b_hh
            if self.mode == "LSTM":
                return lstm_cell(rows + recurrent, state[1], lambda c: c, w_hr)
            if self.mode == "GRU":
                return gru_cell(rows, recurrent, state[0])
            return ((torch.tanh if self.mode == "RNN_TANH" else torch.relu)(rows + recurrent),)

        return run_steps(step, linear(x, w_ih) + b_ih, (), state, sizes=sizes, reverse=reverse)


@given(
    cls=st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]),
    form=forms,
    projected=st.booleans(),
    relu=st.booleans(),
    kind=st.sampled_from(["batch", "unbatched", "packed"]),
    state_given=st.booleans(),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_without_norms_it_is_torchs_network(
    cls: type[nn.RNNBase],
    form: dict[str, Any],
    projected: bool,
    relu: bool,
    kind: str,
    state_given: bool,
) -> None:
    if cls is nn.RNN:
        form = {**form, "nonlinearity": "relu" if relu else "tanh"}
    old = network(cls, form, projected and cls is nn.LSTM)
    new = take_over(Unnormalized(**arguments(old, "")), old)
    x = sequence(old, kind)
    hx = start(old, kind) if state_given else None
    assert type(new(x, hx)[0]) is type(old(x, hx)[0])
    assert_same(results(new, x, hx, parameters(new)), results(old, x, hx, parameters(old)))


def test_packed_output_keeps_what_unpacks_it() -> None:
    old = network(nn.LSTM, {"input_size": 3, "hidden_size": 4})
    new = take_over(Unnormalized(**arguments(old, "")), old)
    x = sequence(old, "packed")
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert torch.equal(getattr(new(x)[0], name), getattr(old(x)[0], name))


def test_dropout_acts_between_layers_in_training_alone() -> None:
    old = nn.LSTM(3, 64, num_layers=2, dropout=0.5)
    new = take_over(Unnormalized(**arguments(old, "")), old)
    x = torch.randn(5, 2, 3)
    torch.manual_seed(5)
    (_, (h, _)), (_, (reference, _)) = new(x), old(x)
    assert torch.allclose(h[0], reference[0], atol=1e-6)  # nothing before the first layer
    assert not torch.allclose(new(x)[0], new(x)[0])
    assert torch.allclose(new.eval()(x)[0], old.eval()(x)[0], atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "state", "words"),
    [
        ((5, 2, 4), None, r"expected \(T, B, 3\)"),
        ((3,), None, r"expected \(T, B, 3\)"),
        ((0, 2, 3), None, "at least one time step"),
        ((5, 2, 3), (1, 3, 4), r"hidden state \(1, 2, 4\)"),
        ((5, 3), (1, 2, 4), r"hidden state \(1, 1, 4\)"),
    ],
)
def test_wrong_shapes_are_refused_in_one_line(
    shape: tuple[int, ...], state: tuple[int, ...] | None, words: str
) -> None:
    new = Unnormalized("GRU", 3, 4)
    with pytest.raises(ValueError, match=words) as raised:
        new(torch.zeros(shape), None if state is None else torch.zeros(state))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_are_torchs(dtype: torch.dtype) -> None:
    x = torch.randn(7, 2, 5, dtype=dtype, requires_grad=True)
    weight = torch.randn(6, 5, dtype=dtype, requires_grad=True)
    g = torch.randn(7, 2, 6, dtype=dtype)
    expected = x @ weight.t()
    actual = linear(x, weight)
    assert_same(
        [actual, *torch.autograd.grad(actual, (x, weight), g)],
        [expected, *torch.autograd.grad(expected, (x, weight), g)],
        1e-5,
    )
    with torch.no_grad():
        for rows in (1, 3, 16):
            few = torch.randn(rows, 5, dtype=dtype)
            assert_same([times(weight, 16)(few)], [few @ weight.t()], 1e-5)
            assert_same(
                [times(weight.t(), 16)(few @ weight.t())], [few @ weight.t() @ weight], 1e-5
            )
            assert_same([product(few, weight)], [few @ weight.t()], 1e-5)


def test_products_differentiate_twice() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(5, 4, requires_grad=True)

    def penalty(call: Any) -> list[Tensor]:
        gradient = torch.autograd.grad(call(x, weight).square().sum(), x, create_graph=True)[0]
        return list(torch.autograd.grad(gradient.square().sum(), (x, weight)))

    assert_same(penalty(linear), penalty(lambda x, weight: x @ weight.t()), 1e-4)


def test_a_batch_of_no_sequences_has_no_outputs() -> None:
    new = LayerNormRecurrent("LSTM", 3, 4)
    y, (h, c) = new(torch.randn(5, 0, 3))
    assert (y.shape, h.shape, c.shape) == ((5, 0, 4), (1, 0, 4), (1, 0, 4))
    y.sum().backward()
    assert new.weight_hh_l0.grad is not None


def test_one_export_does_not_fix_the_sizes_of_the_next() -> None:
    new = LayerNormRecurrent("LSTM", 3, 4).eval()
    for axis, shape in ((0, (7, 2, 3)), (1, (5, 7, 3))):
        program = torch.export.export(
            new, (torch.randn(5, 2, 3),), dynamic_shapes=({axis: torch.export.Dim.DYNAMIC},)
        )
        x = torch.randn(shape)
        assert torch.allclose(program.module()(x)[0], new(x)[0], atol=1e-6)


def _normalized(
    cls: type[nn.RNNBase], method: str, dtype: torch.dtype, **options: Any
) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(cls(5, 6, batch_first=True, **options)).to(dtype)
    return ns.convert(model, method, include="0")[0]


TRANSFORMED = [
    (nn.LSTM, "layer_norm_recurrent", {}),
    (nn.LSTM, "layer_norm_recurrent", {"bidirectional": True}),
    (nn.LSTM, "layer_norm_recurrent", {"proj_size": 3}),
    (nn.GRU, "layer_norm_recurrent", {}),
    (nn.RNN, "layer_norm_recurrent", {}),
    (nn.LSTM, "batch_norm_lstm", {}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("cls", "method", "options"), TRANSFORMED)
def test_gradients_of_torch_func_are_those_of_autograd(
    cls: type[nn.RNNBase], method: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    module = _normalized(cls, method, dtype, **options).eval()
    x = torch.randn(3, 4, 5, dtype=dtype)
    weights = {name: each.detach() for name, each in module.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        y, state = torch.func.functional_call(module, weights, (x,))
        return y.square().sum() + (state[0] if isinstance(state, tuple) else state).sum()

    def of_autograd(x: Tensor) -> dict[str, Tensor]:
        own = {name: each.clone().requires_grad_() for name, each in weights.items()}
        return dict(zip(own, torch.autograd.grad(loss(own, x), list(own.values())), strict=True))

    for name, grad in torch.func.grad(loss)(weights, x).items():
        torch.testing.assert_close(grad, of_autograd(x)[name])

    def of_sample(x: Tensor) -> dict[str, Tensor]:
        return torch.func.grad(loss)(weights, x.unsqueeze(0))

    found = torch.func.vmap(of_sample)(x)
    for index in range(len(x)):
        for name, grad in of_autograd(x[index : index + 1]).items():
            torch.testing.assert_close(found[name][index], grad, rtol=1e-4, atol=1e-5)


def test_training_with_batch_statistics_is_differentiated_by_torch_func() -> None:
    module = _normalized(nn.LSTM, "batch_norm_lstm", torch.float64).train()
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    weights = {name: each.detach() for name, each in module.named_parameters()}
    # Writing into buffers of the module is what torch.func forbids, for torch's BatchNorm as well.
    buffers = {name: each.clone() for name, each in module.named_buffers()}

    def loss(weights: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, (weights, buffers), (x,))[0].square().sum()

    found = torch.func.grad(loss)(weights, buffers)
    module(x)[0].square().sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)
