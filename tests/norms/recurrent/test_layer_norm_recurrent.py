"""Layer normalization in recurrent networks against the equations of Ba et al. 2016."""

import pickle
import weakref
from collections.abc import Callable
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
    by_steps,
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

from normswap.core.errors import NormswapError
from normswap.norms.recurrent import layer_norm
from normswap.norms.recurrent.layer_norm import LayerNormRecurrent
from normswap.norms.registry import method_named

METHOD = method_named("layer_norm_recurrent")
DYNAMIC = torch.export.Dim.DYNAMIC


def build(old: nn.Module, **options: Any) -> LayerNormRecurrent:
    new = METHOD.build(old, **options)
    assert isinstance(new, LayerNormRecurrent)
    return new


def ln(a: Tensor, gain: Tensor, bias: Any, eps: float) -> Tensor:
    """Equations 2 and 3, with the eps of the paper's appendix under the root."""
    mu = a.sum() / len(a)
    sigma = (((a - mu) ** 2).sum() / len(a) + eps).sqrt()
    return gain / sigma * (a - mu) + bias


def formula(module: LayerNormRecurrent, eps: float, per_gate: bool) -> Callable[..., Any]:
    """A step as in the supplement, from the state-dict of `module`."""
    H = module.hidden_size

    def step(suffix: str, k: int, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        def p(name: str) -> Any:
            return getattr(module, name + suffix, 0)

        def norm(a: Tensor, gain: Tensor, bias: Any, gates: list[list[int]]) -> list[Tensor]:
            """LN over each of the lists of gates; the gates."""
            out = {}
            for together in [[g] for each in gates for g in each] if per_gate else gates:
                rows = torch.cat([torch.arange(g * H, g * H + H) for g in together])
                part = ln(a[rows], gain[rows], bias[rows] if module.bias else 0, eps)
                out |= dict(zip(together, part.split(H), strict=True))
            return [out[g] for g in sorted(out)]

        h, a_x, a_h = state[0], p("weight_ih") @ x, p("weight_hh") @ state[0]
        if module.mode == "LSTM":
            of_x = norm(a_x, p("gain_ih"), p("bias_ih"), [[0, 1, 2, 3]])
            of_h = norm(a_h, p("gain_hh"), p("bias_hh"), [[0, 1, 2, 3]])
            i, f, g, o = (a + b for a, b in zip(of_x, of_h, strict=True))
            c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
            h = o.sigmoid() * ln(c, p("gain_c"), p("bias_c"), eps).tanh()
            return (p("weight_hr") @ h if module.proj_size else h), c
        if module.mode == "GRU":
            of_x = norm(a_x, p("gain_ih"), p("bias_ih"), [[0, 1], [2]])
            of_h = norm(a_h, p("gain_hh"), p("bias_hh"), [[0, 1], [2]])
            r, z = (of_x[0] + of_h[0]).sigmoid(), (of_x[1] + of_h[1]).sigmoid()
            n = (of_x[2] + r * of_h[2]).tanh()
            return ((1 - z) * n + z * h,)
        a = ln(a_x + a_h, p("gain"), p("bias_ih") + p("bias_hh"), eps)
        return (a.tanh() if module.mode == "RNN_TANH" else a.relu(),)

    return step


@given(
    cls=st.sampled_from([nn.LSTM, nn.LSTM, nn.GRU, nn.RNN]),
    form=forms,
    projected=st.booleans(),
    relu=st.booleans(),
    kind=st.sampled_from(["batch", "unbatched", "packed"]),
    state_given=st.booleans(),
    per_gate=st.booleans(),
    training=st.booleans(),
    eps=st.sampled_from([1e-5, 0.1]),
)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_it_is_the_published_equations(
    cls: type[nn.RNNBase],
    form: dict[str, Any],
    projected: bool,
    relu: bool,
    kind: str,
    state_given: bool,
    per_gate: bool,
    training: bool,
    eps: float,
) -> None:
    if cls is nn.RNN:
        form = {**form, "nonlinearity": "relu" if relu else "tanh"}
    old = network(cls, form, projected and cls is nn.LSTM)
    new = stirred(build(old, eps=eps, per_gate=per_gate)).train(training)
    x = sequence(old, kind)
    hx = start(old, kind) if state_given else None

    def reference(x: Any, hx: Any) -> Any:
        zeros = [torch.zeros_like(each) for each in flat(start(old, kind))]
        return by_steps(new, formula(new, eps, per_gate), x, zeros if hx is None else hx)

    actual, expected = (results(call, x, hx, parameters(new)) for call in (new, reference))
    assert_same(actual, expected, 1e-7)


@pytest.mark.parametrize("per_gate", [False, True])
@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
def test_weights_are_taken_over_and_gains_start_at_one(cls: Any, per_gate: bool) -> None:
    old = cls(3, 4, num_layers=2, bidirectional=True)
    old.weight_hh_l1.requires_grad_(False)
    new = build(old, per_gate=per_gate)
    kept = new.state_dict()
    for name, weight in old.state_dict().items():
        assert torch.equal(kept.pop(name), weight)
    assert set(kept) == {name for name, _ in new.named_parameters()} - set(old.state_dict())
    for name, vector in kept.items():
        assert torch.equal(vector, torch.full_like(vector, float(name.startswith("gain"))))
    assert not new.weight_hh_l1.requires_grad
    assert new.weight_hh_l0.data_ptr() != old.weight_hh_l0.data_ptr()
    new.load_state_dict(old.state_dict(), strict=False)


def test_a_network_made_by_itself_starts_as_the_paper() -> None:
    new = LayerNormRecurrent("LSTM", 3, 4, 2, batch_first=True, dtype=torch.float64)
    assert new.gain_hh_l1.dtype == torch.float64
    torch.nn.init.zeros_(new.gain_hh_l1)
    new.reset_parameters()
    assert torch.equal(new.gain_hh_l1, torch.ones(16).double())
    assert torch.equal(new.bias_c_l0, torch.zeros(4).double())
    assert "LSTM, 3, 4" in repr(new)


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_sample_does_not_see_the_others(cls: Any) -> None:
    new = build(cls(3, 6, bidirectional=True).double())
    x = torch.randn(5, 4, 3).double()
    together = new(x)[0]
    others = x.clone()
    others[:, 1:] = 9.0
    assert_same([new(x[:, :1])[0], new(others)[0][:, :1]], [together[:, :1]] * 2)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("per_gate", [False, True])
def test_the_fused_lstm_is_the_loop_over_steps(
    packed: bool, reverse: bool, bias: bool, per_gate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = {"input_size": 3, "hidden_size": 5, "bidirectional": reverse, "bias": bias}
    new = stirred(build(network(nn.LSTM, form), per_gate=per_gate))
    kind = "packed" if packed else "batch"
    x, hx = sequence(new, kind), start(new, kind)
    calls = []
    fused = layer_norm.layer_norm_lstm
    monkeypatch.setattr(layer_norm, "layer_norm_lstm", lambda *a: calls.append(1) or fused(*a))
    actual = results(new, x, hx, parameters(new))
    assert calls
    monkeypatch.setattr(layer_norm, "suits", lambda x: False)
    assert_same(actual, results(new, x, hx, parameters(new)), 1e-11)


def test_the_fused_lstm_is_as_exact_in_float32() -> None:
    old = nn.LSTM(32, 48)
    new = stirred(build(old))
    wide = twin(new).double()
    x = torch.randn(20, 8, 32, requires_grad=True)
    actual = results(new, x, None, parameters(new))
    expected = results(wide, x.detach().double().requires_grad_(), None, parameters(wide))
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).abs().max() <= 1e-4 * e.abs().max()


@pytest.mark.parametrize("per_gate", [False, True])
@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
def test_gradients_of_both_orders_are_right(cls: Any, per_gate: bool) -> None:
    new = stirred(build(network(cls, {"input_size": 2, "hidden_size": 2}), per_gate=per_gate))
    names = [name for name, _ in new.named_parameters()]
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    hx = start(new, "batch", batch=2)
    weights = [p.detach().clone().requires_grad_() for p in new.parameters()]

    def call(x: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        state, tensors = given[: len(flat(hx))], given[len(flat(hx)) :]
        hidden = tuple(state) if new.mode == "LSTM" else state[0]
        named = dict(zip(names, tensors, strict=True))
        return tuple(flat(torch.func.functional_call(new, named, (x, hidden))))

    inputs = (x, *flat(hx), *weights)
    # With two numbers per gate LN is almost a sign, whose gradients are large: hence the eps.
    new.eps = 0.5
    assert torch.autograd.gradcheck(call, inputs, fast_mode=False)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def test_a_forward_without_backward_leaves_nothing_behind() -> None:
    y, (h, c) = build(nn.LSTM(3, 4))(torch.randn(5, 2, 3))
    node = weakref.ref(y.grad_fn)
    assert node() is not None
    del y, h, c
    assert node() is None


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
def test_copies_and_stored_weights_give_the_same(cls: Any, tmp_path: Path) -> None:
    new = stirred(build(cls(3, 4, num_layers=2)))
    x = torch.randn(5, 2, 3)
    fresh = build(cls(3, 4, num_layers=2))
    fresh.load_state_dict(new.state_dict())
    for each in (twin(new), pickle.loads(pickle.dumps(new)), fresh):
        assert torch.equal(each(x)[0], new(x)[0])
    new.flatten_parameters()  # as users of nn.LSTM call it


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
def test_half_precision_runs_and_is_close(cls: Any, dtype: torch.dtype) -> None:
    new = build(cls(3, 8))
    x = torch.randn(5, 4, 3)
    y, _ = twin(new).to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    y.sum().backward()
    assert (y.float() - new(x)[0]).abs().max() < 0.1
    with torch.autocast("cpu", torch.bfloat16):
        assert (new(x)[0].float() - new(x.float())[0]).abs().max() < 0.1


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU])
def test_it_compiles_without_graph_breaks(cls: Any) -> None:
    new = build(cls(3, 4, batch_first=True))
    x = torch.randn(2, 2, 3)
    compiled = torch.compile(new, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(x)[0], new(x)[0]
    assert torch.allclose(actual, expected, atol=1e-6)
    weights = parameters(new)
    a, e = (torch.autograd.grad(y.square().sum(), weights) for y in (actual, expected))
    assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(a, e, strict=True))


@pytest.mark.parametrize(
    ("cls", "per_gate"), [(nn.LSTM, False), (nn.LSTM, True), (nn.GRU, False), (nn.RNN, False)]
)
def test_the_exported_file_takes_any_number_of_steps(
    cls: Any, per_gate: bool, tmp_path: Path
) -> None:
    new = stirred(build(cls(3, 4, batch_first=True, bidirectional=True), per_gate=per_gate)).eval()
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


@pytest.mark.parametrize("module", [nn.Linear(2, 2), nn.LSTMCell(2, 2)])
def test_other_modules_are_refused(module: nn.Module) -> None:
    with pytest.raises(NormswapError, match="takes the place of an nn"):
        METHOD.build(module)
