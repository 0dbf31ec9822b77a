"""What holds for every method of the batch family: its published formula, and how it is used."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from batch_formulas import CASES, EPS, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Residual, error, in_eval, randomise
from torch import Tensor, nn

import normswap as ns
from normswap.norms.batch.frozen import scale_and_shift

SHAPES = st.tuples(
    st.integers(2, 7), st.integers(1, 5), st.lists(st.integers(1, 5), max_size=3)
).map(lambda shape: (shape[0], shape[1], *shape[2]))
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def made(case: Case, channels: int, seed: int = 0, **options: Any) -> nn.Module:
    """A module in float64 whose parameters and statistics all do something."""
    module = ns.create(case.method, channels, **{**case.options, **options}).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            positive = name.endswith(("weight", "running_var", "running_deviation"))
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.copy_(0.5 + noise if positive else noise - 0.5)
    return module


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def data(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x * 1.7 + torch.arange(float(shape[1])).view(-1, *[1] * (len(shape) - 2))


def erases(case: Case, shape: tuple[int, ...]) -> bool:
    """A ghost batch of the formula's 2 samples would be a single value."""
    alone = shape[0] % 2 == 1 and torch.Size(shape[2:]).numel() == 1
    return case.method == "ghost_batch_norm" and alone


@each_case
@given(shape=SHAPES, training=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=8, deadline=None)
def test_outputs_and_gradients_are_the_published_formulas(
    case: Case, shape: tuple[int, ...], training: bool, seed: int
) -> None:
    if erases(case, shape):
        shape = (shape[0] + 1, *shape[1:])
    module = made(case, shape[1], seed).train(training)
    expected_state = {
        k: v.requires_grad_(v.is_floating_point()) for k, v in state_of(module).items()
    }
    x, g = data(shape, seed).requires_grad_(), torch.randn(shape, dtype=torch.float64)
    y = case.call(module, x)
    z = x.detach().clone().requires_grad_()
    expected, running = case.formula(z, expected_state, training)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    parameters = dict(module.named_parameters())
    actual = torch.autograd.grad(y, [x, *parameters.values()], g)
    wanted = torch.autograd.grad(expected, [z, *(expected_state[k] for k in parameters)], g)
    # Two equal values of a channel are a gradient of 1 / sqrt(eps), which magnifies rounding.
    torch.testing.assert_close(actual, wanted, rtol=1e-7, atol=1e-7)
    now = module.state_dict()
    for name, value in (running if training else expected_state).items():
        torch.testing.assert_close(now[name], value.detach(), rtol=1e-9, atol=1e-12)


@each_case
def test_running_statistics_follow_several_batches(case: Case) -> None:
    module = made(case, 3).train()
    state = state_of(module)
    for step in range(4):
        x = data((4, 3, 5), step)
        case.call(module, x)
        state |= case.formula(x, state, True)[1]
    for name, value in state.items():
        if value.is_floating_point():
            torch.testing.assert_close(module.state_dict()[name], value)


@each_case
@pytest.mark.parametrize("training", [True, False])
def test_derivatives_of_first_and_second_order_are_numerically_right(
    case: Case, training: bool
) -> None:
    module = made(case, 2, momentum=0.0, **case.pure).train(training)
    x = data((4, 2, 3)).requires_grad_()
    inputs = (x, *module.parameters())

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return case.call(module, x)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@each_case
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_second_derivatives_of_one_parameter_alone_are_right(case: Case, name: str) -> None:
    module = made(case, 2, momentum=0.0, **case.pure).train()
    parameter = getattr(module, name, None)
    if parameter is None:
        pytest.skip("it has none")
    module.requires_grad_(False)
    parameter.requires_grad_()
    x = data((4, 2, 3))
    assert torch.autograd.gradgradcheck(lambda _: case.call(module, x), parameter)


@each_case
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms_and_batches_of_gradients_give_the_same(case: Case) -> None:
    module = made(case, 3, momentum=0.0).train()
    x, gs = data((4, 3, 5)).requires_grad_(), torch.randn(2, 4, 3, 5, dtype=torch.float64)
    expected = torch.stack([torch.autograd.grad(case.call(module, x), x, g)[0] for g in gs])
    y = case.call(module, x)
    torch.testing.assert_close(
        torch.autograd.grad(y, x, gs, is_grads_batched=True, retain_graph=True)[0], expected
    )
    state = dict(module.named_parameters()), {k: v.clone() for k, v in module.named_buffers()}

    def loss(x: Tensor, state: Any) -> Tensor:
        return (torch.func.functional_call(Called(case, module), named(state), (x,)) * gs[0]).sum()

    def named(state: Any) -> Any:
        return tuple({f"module.{k}": v for k, v in each.items()} for each in state)

    torch.testing.assert_close(torch.func.grad(loss)(x.detach(), state), expected[0])


class Called(nn.Module):
    def __init__(self, case: Case, module: nn.Module) -> None:
        super().__init__()
        self.case, self.module = case, module

    def forward(self, x: Tensor) -> Tensor:
        return self.case.call(self.module, x)


@each_case
def test_no_gradient_from_above_is_none_below(case: Case) -> None:
    """As where a later function, of its own backward, has none for this output."""

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:
            return None

    module, x = made(case, 3).train(), data((4, 3, 5)).requires_grad_()
    (Stop.apply(case.call(module, x)).sum() + x.sum()).backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@each_case
def test_tracking_can_be_switched_off_later(case: Case) -> None:
    module = made(case, 3).train()
    if not hasattr(module, "track_running_stats"):
        pytest.skip("it has no such attribute")
    module.track_running_stats = False
    before = state_of(module)
    case.call(module, data((4, 3, 5)))
    torch.testing.assert_close(module.state_dict(), before)


@each_case
def test_without_affine_gain_is_one_and_bias_zero(case: Case) -> None:
    x = data((4, 3, 5))
    plain, free = made(case, 3), ns.create(case.method, 3, affine=False, **case.options).double()
    with torch.no_grad():
        for name, one in (("weight", 1.0), ("bias", 0.0)):
            if getattr(plain, name, None) is not None:
                getattr(plain, name).fill_(one)
        assert getattr(free, "weight", None) is None
        assert free.bias is None
        free.load_state_dict(plain.state_dict(), strict=False)
    for training in (True, False):
        actual = case.call(free.train(training), x)
        torch.testing.assert_close(actual, case.call(plain.train(training), x))


@each_case
def test_momentum_none_averages_all_batches(case: Case) -> None:
    module = ns.create(case.method, 3, **{**case.options, "momentum": None}).double()
    batches = [data((2, 3, 5), step) for step in range(3)]
    for x in batches:
        case.call(module, x)
    name = "others.night.running_mean" if "adaptive" in case.method else "running_mean"
    expected = torch.stack([x.mean((0, 2)) for x in batches]).mean(0)
    torch.testing.assert_close(module.state_dict()[name], expected)


@each_case
def test_copies_are_independent_and_the_same(case: Case) -> None:
    module = made(case, 3).train()
    x = data((4, 3, 5))
    twin, sent = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    before = state_of(module)
    expected = case.call(module, x)
    for other in (twin, sent):
        torch.testing.assert_close(other.state_dict(), before)
        torch.testing.assert_close(case.call(other, x), expected)


@each_case
def test_state_dict_makes_a_new_module_the_same(case: Case) -> None:
    module = made(case, 3).eval()
    other = ns.create(case.method, 3, **case.options).double().eval()
    other.load_state_dict(module.state_dict())
    x = data((4, 3, 5))
    torch.testing.assert_close(case.call(other, x), case.call(module, x))


@each_case
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("whole", [True, False], ids=["module too", "input only"])
def test_half_precision_is_right_to_its_rounding(
    case: Case, training: bool, dtype: torch.dtype, whole: bool
) -> None:
    module = made(case, 3).train(training)
    x = data((6, 3, 7, 5)).to(dtype)
    expected = case.call(copy.deepcopy(module), x.double())
    y = case.call(module.to(dtype if whole else torch.float32), x.requires_grad_())
    y.sum().backward()
    assert y.dtype == dtype
    tolerance = 0.05 if dtype == torch.bfloat16 else 0.008
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


@each_case
@pytest.mark.parametrize("training", [True, False])
def test_memory_format_is_kept(case: Case, training: bool) -> None:
    module = made(case, 3).train(training)
    x = data((4, 3, 6, 5))
    last = x.to(memory_format=torch.channels_last)
    expected = case.call(copy.deepcopy(module), x)
    y = case.call(module, last)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected)


@each_case
def test_a_step_keeps_only_the_input_for_backward(case: Case) -> None:
    module = ns.create(case.method, 3, **case.options).train()
    x = torch.randn(4, 3, 16, 16, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        case.call(module, x)
    large = {t.data_ptr() for t in kept if t.numel() > 4 * 3}
    assert large <= {x.data_ptr()}


@each_case
def test_onnx_runtime_agrees_at_any_batch_size(case: Case, tmp_path: Path) -> None:
    model = nn.Sequential(nn.ReLU(), made(case, 3).float(), nn.Conv2d(3, 2, 1)).eval()
    report = ns.export(model, torch.randn(2, 3, 5, 5), tmp_path / "model.onnx")
    assert report.passed
    assert report.dynamic


@each_case
@pytest.mark.parametrize("training", [True, False])
def test_compiled_it_has_one_graph_and_the_same_result(case: Case, training: bool) -> None:
    module = made(case, 3).train(training)
    x = data((4, 3, 5))
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        expected, actual = module(x), compiled(x)
        torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(twin.state_dict(), module.state_dict())
    torch._dynamo.reset()


@each_case
def test_conversion_keeps_the_function(case: Case) -> None:
    model = randomise(Residual()).eval()
    x = torch.randn(2, 3, 8, 8)
    converted = ns.convert(model, case.method, inputs=x)
    own = type(ns.create(case.method, 3))
    count = sum(type(module) is own for module in converted.modules())
    # The scale of a mean-only one needs a weight before it: not so after an addition.
    assert count == (4 if "mean_only" in case.method else 5)
    assert error(in_eval(converted, x), in_eval(model, x)) < 1e-5


@each_case
def test_conversion_carries_momentum_over(case: Case) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=0.03)).eval()
    converted = ns.convert(model, case.method, inputs=torch.randn(2, 3, 4, 4))
    assert converted[1].momentum == 0.03


@pytest.mark.parametrize("case", [c for c in CASES if "conditional" not in c.method], ids=str)
@pytest.mark.parametrize("change", ["fold", "freeze"])
def test_converted_networks_fold_and_freeze(case: Case, change: str) -> None:
    x = torch.randn(2, 3, 8, 8)
    model = ns.convert(randomise(Residual()).eval(), case.method, inputs=x)
    changed = ns.fold(model, x) if change == "fold" else ns.freeze(model, x, mode="tune")
    assert error(in_eval(changed, x), in_eval(model, x)) < 1e-5


@pytest.mark.parametrize("case", [c for c in CASES if "conditional" not in c.method], ids=str)
def test_eval_mode_is_the_affine_it_names(case: Case) -> None:
    module = made(case, 3).eval()
    x = data((4, 3, 5))
    scale, shift = scale_and_shift(module, torch.float64)
    assert scale.shape == shift.shape == (3,)
    torch.testing.assert_close(module(x), scale[:, None] * x + shift[:, None])


@each_case
@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((3,), "expected"),
        ((4, 2, 5), "expected"),
        ((1, 3), "single value"),
        ((1, 3, 1, 1), "single"),
    ],
)
def test_inputs_that_cannot_be_normalized_are_refused_in_one_line(
    case: Case, shape: tuple[int, ...], words: str
) -> None:
    with pytest.raises(ValueError, match=words) as raised:
        ns.create(case.method, 3, **case.options).train()(torch.randn(shape))
    assert "\n" not in str(raised.value)


@each_case
def test_an_empty_batch_passes_and_teaches_nothing(case: Case) -> None:
    module = made(case, 3).train()
    before = state_of(module)
    assert case.call(module, torch.randn(0, 3, 5, dtype=torch.float64)).shape == (0, 3, 5)
    after = module.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items() if v.is_floating_point())


@each_case
def test_eps_is_what_was_asked_for(case: Case) -> None:
    module = ns.create(case.method, 3)
    assert module.eps == (0.0 if "mean_only" in case.method else EPS)
    assert module.num_features == 3


@each_case
def test_statistics_of_half_precision_are_taken_in_single(case: Case) -> None:
    module = ns.create(case.method, 3, **{**case.options, "momentum": None}).train()
    x = data((2, 3, 50)).bfloat16()
    case.call(module, x)
    name = "others.night.running_mean" if "adaptive" in case.method else "running_mean"
    expected = x.double().mean((0, 2)).float()
    torch.testing.assert_close(module.state_dict()[name], expected, rtol=1e-5, atol=1e-6)
