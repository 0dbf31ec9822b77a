"""Batch normalization in an LSTM against the equations of Cooijmans et al. 2016."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrent_cases import (
    assert_same,
    flat,
    forms,
    network,
    parameters,
    results,
    sequence,
    start,
    stirred,
    twin,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from normswap.core.errors import NormswapError
from normswap.norms.recurrent.batch_norm import BatchNormLSTM
from normswap.norms.registry import method_named

METHOD = method_named("batch_norm_lstm")
DYNAMIC = torch.export.Dim.DYNAMIC
Running = dict[str, Tensor]


def build(old: nn.Module, **options: Any) -> BatchNormLSTM:
    new = METHOD.build(old, **options)
    assert isinstance(new, BatchNormLSTM)
    return new


def reference(module: BatchNormLSTM, running: Running, x: Any, hx: Any) -> Any:
    """Section 3 of the paper, on all sequences at once; `running` is moved in training."""
    packed = isinstance(x, PackedSequence)
    if packed:
        rows, lengths = pad_packed_sequence(x)
    else:
        rows = x.transpose(0, 1) if module.batch_first else x
        lengths = torch.full((rows.shape[1],), rows.shape[0])
    ends_h, ends_c = [], []
    for layer in range(module.num_layers):
        both = []
        for direction in range(2 if module.bidirectional else 1):
            suffix = f"_l{layer}" + "_reverse" * direction
            h, c = hx[0][len(ends_h)], hx[1][len(ends_h)]
            outputs: dict[int, Tensor] = {}
            steps = len(rows)
            for k, t in enumerate(range(steps)[::-1] if direction else range(steps)):
                there = lengths > t
                new_h, new_c = _step(module, running, suffix, k, rows[t, there], h[there], c[there])
                h, c = (_put(old, there, new) for old, new in ((h, new_h), (c, new_c)))
                outputs[t] = torch.where(there[:, None], h, 0)
            both.append(torch.stack([outputs[t] for t in range(steps)]))
            ends_h.append(h)
            ends_c.append(c)
        rows = torch.cat(both, -1)
    if packed:
        y = torch.nn.utils.rnn.pack_padded_sequence(rows, lengths, enforce_sorted=False)
    else:
        y = rows.transpose(0, 1) if module.batch_first else rows
    return y, (torch.stack(ends_h), torch.stack(ends_c))


def _put(old: Tensor, there: Tensor, new: Tensor) -> Tensor:
    whole = torch.zeros_like(old).index_put((there.nonzero()[:, 0],), new)
    return torch.where(there[:, None], whole, old)


def _step(
    module: BatchNormLSTM, running: Running, suffix: str, k: int, x: Tensor, h: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    def p(name: str) -> Any:
        return getattr(module, name + suffix, 0)

    def bn(a: Tensor, name: str, beta: Any) -> Tensor:
        at = min(k, module.max_length - 1)
        means, variances = (running[f"running_{s}_{name}{suffix}"] for s in ("mean", "var"))
        if module.training and len(a) > 1:
            mean = a.sum(0) / len(a)
            var = ((a - mean) ** 2).sum(0) / len(a)
            if k < module.max_length:
                m = module.momentum
                means[at] = (1 - m) * means[at] + m * mean.detach()
                unbiased = var.detach() * len(a) / (len(a) - 1)
                variances[at] = (1 - m) * variances[at] + m * unbiased
        else:
            mean, var = means[at].clone(), variances[at].clone()
        return p(f"gain_{name}") * (a - mean) / (var + module.eps).sqrt() + beta

    gates = bn(x @ p("weight_ih").t(), "ih", 0) + bn(h @ p("weight_hh").t(), "hh", 0)
    i, f, g, o = (gates + p("bias_ih") + p("bias_hh")).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * bn(c, "c", p("bias_c")).tanh()
    return (h @ p("weight_hr").t() if module.proj_size else h), c


@given(
    form=forms,
    projected=st.booleans(),
    packed=st.booleans(),
    max_length=st.sampled_from([1, 3, 5, 9]),
    training=st.booleans(),
    momentum=st.sampled_from([0.1, 0.7]),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_it_is_the_published_equations(
    form: dict[str, Any],
    projected: bool,
    packed: bool,
    max_length: int,
    training: bool,
    momentum: float,
) -> None:
    old = network(nn.LSTM, form, projected)
    new = stirred(build(old, max_length=max_length, momentum=momentum, eps=1e-2)).train(training)
    kind = "packed" if packed else "batch"
    running = {
        name: buffer.copy_(torch.rand_like(buffer)).clone() for name, buffer in new.named_buffers()
    }
    for _ in range(2):  # the second time with moved statistics
        x, hx = sequence(new, kind), start(new, kind)
        expected = results(lambda x, hx: reference(new, running, x, hx), x, hx, parameters(new))
        assert_same(results(new, x, hx, parameters(new)), expected, 1e-6)
    for name, buffer in new.named_buffers():
        torch.testing.assert_close(buffer, running[name])


def test_weights_are_taken_over_and_gains_start_at_a_tenth() -> None:
    old = nn.LSTM(3, 4, num_layers=2, bidirectional=True)
    new = build(old)
    kept = new.state_dict()
    for name, weight in old.state_dict().items():
        assert torch.equal(kept.pop(name), weight)
    for name, vector in kept.items():
        value = 0.1 if name.startswith("gain") else float(name.startswith("running_var"))
        assert torch.equal(vector, torch.full_like(vector, value))
    assert new.running_mean_ih_l1_reverse.shape == (100, 16)
    assert new.running_var_c_l0.shape == (100, 4)
    torch.nn.init.zeros_(new.gain_c_l0)
    new.reset_parameters()
    assert torch.equal(new.gain_c_l0, torch.full((4,), 0.1))


def test_in_eval_mode_a_sample_does_not_see_the_others() -> None:
    new = build(nn.LSTM(3, 6, bidirectional=True).double(), max_length=3)
    x = torch.randn(5, 4, 3).double()
    new(x)
    new.eval()
    assert_same([new(x[:, :1])[0]], [new(x)[0][:, :1]])


def test_statistics_stay_in_eval_mode_and_of_steps_that_were_not_taken() -> None:
    new = build(nn.LSTM(3, 4), max_length=6)
    new(torch.randn(4, 5, 3))
    assert torch.equal(new.running_var_ih_l0[4:], torch.ones(2, 16))
    assert not torch.equal(new.running_var_ih_l0[3], torch.ones(16))
    before = {name: buffer.clone() for name, buffer in new.named_buffers()}
    new.eval()(torch.randn(8, 5, 3))
    assert all(torch.equal(buffer, before[name]) for name, buffer in new.named_buffers())


def test_a_batch_of_one_cannot_be_trained_on() -> None:
    new = build(nn.LSTM(3, 4))
    with pytest.raises(ValueError, match="batch of one") as raised:
        new(torch.randn(5, 1, 3))
    assert "\n" not in str(raised.value)
    assert torch.isfinite(new.eval()(torch.randn(5, 1, 3))[0]).all()


def test_two_batches_before_one_backward_keep_their_gradients() -> None:
    new = stirred(build(network(nn.LSTM, {"input_size": 3, "hidden_size": 4})))
    again = twin(new)
    first, second = sequence(new, "packed"), sequence(new, "packed", lengths=(2, 4))
    alone = results(again, first, None, parameters(again))
    y, state = new(first)
    new(second)
    together = results(lambda *_: (y, state), first, None, parameters(new))
    assert_same(together, alone)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_both_orders_are_right(training: bool) -> None:
    new = stirred(build(network(nn.LSTM, {"input_size": 2, "hidden_size": 2}), eps=0.5))
    new.train(training)
    names = [name for name, _ in new.named_parameters()]
    x = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    weights = [p.detach().clone().requires_grad_() for p in new.parameters()]

    def call(x: Tensor, h: Tensor, c: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(names, tensors, strict=True))
        return tuple(flat(torch.func.functional_call(new, named, (x, (h, c)))))

    inputs = (x, *start(new, "batch", batch=3), *weights)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def test_copies_and_stored_weights_give_the_same() -> None:
    new = stirred(build(nn.LSTM(3, 4, num_layers=2), max_length=4))
    x = torch.randn(5, 6, 3)
    new(x)
    fresh = build(nn.LSTM(3, 4, num_layers=2), max_length=4)
    fresh.load_state_dict(new.state_dict())
    for each in (twin(new), pickle.loads(pickle.dumps(new)), fresh):
        assert torch.equal(each.eval()(x)[0], new.eval()(x)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_and_is_close(dtype: torch.dtype) -> None:
    new = build(nn.LSTM(3, 8))
    x = torch.randn(5, 4, 3)
    half = twin(new).to(dtype)
    y, _ = half(x.to(dtype))
    assert y.dtype == dtype
    y.sum().backward()
    assert (y.float() - new(x)[0]).abs().max() < 0.1
    assert (half.eval()(x.to(dtype))[0].float() - new.eval()(x)[0]).abs().max() < 0.1


def test_it_compiles_without_graph_breaks() -> None:
    new = build(nn.LSTM(3, 4, batch_first=True))
    x = torch.randn(3, 2, 3)
    for training in (True, False):
        again = twin(new).train(training)
        expected = again(x)[0]
        compiled = torch.compile(twin(new).train(training), fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x)[0], expected, atol=1e-6)


def test_the_exported_file_takes_any_number_of_steps(tmp_path: Path) -> None:
    new = build(nn.LSTM(3, 4, batch_first=True, bidirectional=True), max_length=4)
    for _ in range(3):
        new(torch.randn(6, 7, 3))
    new.eval()
    path = tmp_path / "model.onnx"
    with torch.no_grad():  # or torch traces the backward of the loop as well
        program = torch.onnx.export(
            new,
            (torch.randn(2, 5, 3),),
            dynamo=True,
            dynamic_shapes=({0: DYNAMIC, 1: DYNAMIC},),
            verbose=False,
        )
    program.save(path)
    session = onnxruntime.InferenceSession(path)
    for batch, steps in ((2, 5), (3, 9), (1, 1)):
        x = torch.randn(batch, steps, 3)
        actual = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        for a, e in zip(actual, flat(new(x)), strict=True):
            assert np.abs(a - e.detach().numpy()).max() < 1e-5


@pytest.mark.parametrize(
    ("module", "options", "words"),
    [
        (nn.GRU(2, 2), {}, "place of an nn.LSTM, not of a GRU"),
        (nn.RNN(2, 2), {}, "layer_norm_recurrent takes that of any"),
        (nn.Linear(2, 2), {}, "not of a Linear"),
        (nn.LSTM(2, 2), {"max_length": 0}, "at least 1"),
    ],
)
def test_what_it_cannot_be_made_from_is_refused(
    module: nn.Module, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(NormswapError, match=words) as raised:
        METHOD.build(module, **options)
    assert "\n" not in str(raised.value)
