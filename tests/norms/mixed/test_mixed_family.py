"""What holds for every method of the mixed family: its published formula, and how it is used."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixed_formulas import CASES, MOMENTUM, Case, over
from networks import Residual, error, in_eval, randomise
from torch import Tensor, nn

import normswap as ns

SHAPES = st.tuples(
    st.integers(2, 5), st.sampled_from([2, 4, 6]), st.lists(st.integers(1, 5), max_size=3)
).map(lambda shape: (shape[0], shape[1], *shape[2]))
each_case = pytest.mark.parametrize("case", CASES, ids=str)
in_each_mode = pytest.mark.parametrize("training", [True, False])


def made(case: Case, channels: int, seed: int = 0) -> nn.Module:
    """A module in float64 whose parameters and statistics all do something."""
    module = ns.create(case.method, channels, **case.options).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                is_sign_free = name in ("bias", "running_mean", "mean_weight", "var_weight")
                start = {"gate": 0.0, "v": -0.5}.get(name, -0.5 if is_sign_free else 0.5)
                tensor.copy_(start + noise)
    return module


def data(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x * 1.7 + torch.arange(float(shape[1])).view(-1, *[1] * (len(shape) - 2))


@each_case
@given(shape=SHAPES, training=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_outputs_and_gradients_are_the_published_formulas(
    case: Case, shape: tuple[int, ...], training: bool, seed: int
) -> None:
    module = made(case, shape[1], seed).train(training)
    state = {
        key: value.clone().requires_grad_(value.is_floating_point())
        for key, value in module.state_dict().items()
    }
    x = data(shape, seed).requires_grad_()
    g = torch.randn(shape, dtype=torch.float64)
    z = x.detach().clone().requires_grad_()
    y, expected = module(x), case.formula(z, state, training)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    parameters = dict(module.named_parameters())
    actual = torch.autograd.grad(y, [x, *parameters.values()], g)
    wanted = torch.autograd.grad(expected, [z, *(state[key] for key in parameters)], g)
    torch.testing.assert_close(actual, wanted, rtol=1e-7, atol=1e-7)


@each_case
def test_running_statistics_follow_several_batches(case: Case) -> None:
    module = made(case, 4).train()
    expected = {key: value.clone() for key, value in module.state_dict().items()}
    for step in range(4):
        x = data((3, 4, 5), step)
        module(x)
        mean, var = (each.flatten() for each in over(x, 0))
        for key, batch in (("running_mean", mean), ("running_var", var * 15 / 14)):
            if key in expected:
                expected[key] = (1 - MOMENTUM) * expected[key] + MOMENTUM * batch
        if "num_batches_tracked" in expected:
            expected["num_batches_tracked"] += 1
    torch.testing.assert_close(module.state_dict(), expected)
    before = copy.deepcopy(expected)
    module.eval()(x)
    torch.testing.assert_close(module.state_dict(), before)


@each_case
@in_each_mode
def test_derivatives_of_first_and_second_order_are_numerically_right(
    case: Case, training: bool
) -> None:
    module = made(case, 2).train(training)
    names = [name for name, _ in module.named_parameters()]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(module, given, (x,))

    x = data((3, 2, 3)).requires_grad_()
    inputs = (x, *(p.detach().requires_grad_() for p in module.parameters()))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@each_case
def test_the_differentiable_backward_is_the_ordinary_one(case: Case) -> None:
    """With create_graph another code path gives the first derivatives."""
    module, x = made(case, 4).train(), data((3, 4, 5)).requires_grad_()
    inputs = [x, *module.parameters()]
    g = torch.randn(x.shape, dtype=torch.float64)
    ordinary = torch.autograd.grad(module(x), inputs, g)
    again = torch.autograd.grad(module(x), inputs, g, create_graph=True)
    torch.testing.assert_close(again, ordinary)


@each_case
@in_each_mode
def test_gradients_of_some_parameters_alone_are_those_of_all(case: Case, training: bool) -> None:
    module, x = made(case, 4).train(training), data((3, 4, 5))
    full = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    for (name, parameter), expected in zip(module.named_parameters(), full, strict=True):
        alone = copy.deepcopy(module).requires_grad_(False)
        parameter = alone.get_parameter(name).requires_grad_()
        for create_graph in (False, True):
            loss = alone(x).square().sum()
            (actual,) = torch.autograd.grad(loss, parameter, create_graph=create_graph)
            torch.testing.assert_close(actual, expected)


@each_case
@in_each_mode
def test_without_affine_gain_is_one_and_bias_zero(case: Case, training: bool) -> None:
    plain, free = made(case, 4), ns.create(case.method, 4, affine=False, **case.options).double()
    with torch.no_grad():
        plain.weight.fill_(1.0)
        plain.bias.fill_(0.0)
    assert free.weight is None
    assert free.bias is None
    state = {k: v for k, v in plain.state_dict().items() if k not in ("weight", "bias")}
    free.load_state_dict(state)
    x = data((3, 4, 5))
    torch.testing.assert_close(free.train(training)(x), plain.train(training)(x))


@each_case
def test_copies_are_independent_and_the_same(case: Case) -> None:
    module, x = made(case, 4).train(), data((3, 4, 5))
    twin, sent = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    expected = module(x)
    for other in (twin, sent):
        torch.testing.assert_close(other.state_dict(), before)
        torch.testing.assert_close(other(x), expected)


@each_case
def test_state_dict_makes_a_new_module_the_same(case: Case) -> None:
    module, x = made(case, 4).eval(), data((3, 4, 5))
    other = ns.create(case.method, 4, **case.options).double().eval()
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other(x), module(x))


@each_case
@in_each_mode
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("whole", [True, False], ids=["module too", "input only"])
def test_half_precision_is_right_to_its_rounding(
    case: Case, training: bool, dtype: torch.dtype, whole: bool
) -> None:
    module = made(case, 4).train(training)
    x = data((6, 4, 7, 5)).to(dtype)
    expected = copy.deepcopy(module)(x.double())
    y = module.to(dtype if whole else torch.float32)(x.requires_grad_())
    y.sum().backward()
    assert y.dtype == dtype
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in module.parameters())
    tolerance = 0.05 if dtype == torch.bfloat16 else 0.008
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


@each_case
@in_each_mode
def test_memory_format_is_kept(case: Case, training: bool) -> None:
    module, x = made(case, 4).train(training), data((3, 4, 6, 5))
    last = x.to(memory_format=torch.channels_last).requires_grad_()
    g = torch.randn_like(x)
    y = module(last)
    assert y.is_contiguous(memory_format=torch.channels_last)
    expected = copy.deepcopy(module)(x.requires_grad_())
    torch.testing.assert_close(y, expected)
    actual, wanted = torch.autograd.grad(y, last, g), torch.autograd.grad(expected, x, g)
    torch.testing.assert_close(actual, wanted)


@each_case
@in_each_mode
def test_a_step_keeps_only_the_input_for_backward(case: Case, training: bool) -> None:
    module = made(case, 4).float().train(training)
    x = torch.randn(3, 4, 16, 16, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(x)
    assert kept
    assert {t.data_ptr() for t in kept if t.numel() > 3 * 4} <= {x.data_ptr()}


@each_case
@in_each_mode
def test_compiled_without_breaks_it_is_the_same(case: Case, training: bool) -> None:
    module = made(case, 4).train(training)
    other = torch.compile(copy.deepcopy(module), backend="aot_eager", fullgraph=True)
    x, g = data((3, 4, 5, 3)), data((3, 4, 5, 3), 1)
    results = []
    for each in (module, other):
        z = x.clone().requires_grad_()
        y = each(z)
        y.backward(g)
        grads = [parameter.grad for parameter in each.parameters()]
        results.append([y, z.grad, *grads, *each.state_dict().values()])
    torch.testing.assert_close(*results)


@each_case
def test_onnx_runtime_agrees_at_any_batch_size(case: Case, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), made(case, 4).float(), nn.ReLU()).eval()
    report = ns.export(model, torch.randn(2, 3, 5, 5), tmp_path / "model.onnx")
    assert report.dynamic
    assert report.passed


@each_case
@in_each_mode
@pytest.mark.parametrize("shape", [(3, 5, 2), (3,)], ids=str)
def test_another_number_of_channels_is_refused(
    case: Case, training: bool, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="got"):
        made(case, 4).train(training)(data((*shape, 1))[..., 0])


@pytest.mark.parametrize("case", [case for case in CASES if case.method != "evonorm_s0"], ids=str)
def test_a_single_value_per_channel_is_refused_in_training(case: Case) -> None:
    module = made(case, 4)
    with pytest.raises(ValueError, match="single value"):
        module(data((1, 4)))
    assert module.eval()(data((1, 4))).shape == (1, 4)


@each_case
def test_a_pretrained_network_takes_it(case: Case) -> None:
    """As its class says: exactly, nearly, or with gain, bias and momentum carried over alone."""
    x, model = torch.randn(4, 3, 8, 8), randomise(Residual()).eval()
    model.bn.momentum = 0.03
    # One position per group leaves EvoNorm-S0 nothing to take a deviation over.
    options = {"exclude": "head"} if case.method == "evonorm_s0" else {}
    converted = ns.convert(model, case.method, inputs=x, **options)
    own = type(made(case, 4))
    replaced = [name for name, module in converted.named_modules() if type(module) is own]
    assert len(replaced) == (4 if options else 5)
    for name in replaced:
        torch.testing.assert_close(
            converted.get_submodule(name).weight, model.get_submodule(name).weight
        )
    assert getattr(converted.bn, "momentum", 0.03) == 0.03
    within = {"exact": 1e-5, "near": 0.01}.get(ns.methods()[case.method].keeps)
    if within is not None:
        assert error(in_eval(converted, x), in_eval(model, x)) <= within
