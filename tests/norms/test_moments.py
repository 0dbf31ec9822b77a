"""The moments core is its formula: forward, backward, twice backward, in every form of memory."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad

from normswap.norms.moments import channel_affine, moments, normalize, pooled

SHAPES = st.lists(st.integers(1, 5), min_size=2, max_size=5).map(tuple)
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.clone(),
    "channels last": lambda x: x.clone(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "sliced": lambda x: torch.cat([x, x], 3)[..., ::2],
    "sliced rows": lambda x: torch.cat([x, x], 0)[: len(x)],
    "expanded": lambda x: x[:, :, :1].expand_as(x),
    "expanded batch": lambda x: x[:1].expand_as(x),
}
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def mix(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Every output depends on every moment, of its own sample and of the others."""
    center, spread = pooled(mean, var, 0)
    scale = torch.rsqrt(var + spread + 0.1) * (1 + 0.2 * torch.tanh(mean))
    return scale, torch.sin(mean - center) + torch.log1p(var)


def reference(x: Tensor) -> Tensor:
    """normalize(x, mix), written out."""
    flat = x.reshape(*x.shape[:2], -1)
    mean, var = flat.mean(2), flat.var(2, correction=0)
    batch = x.transpose(0, 1).reshape(x.shape[1], -1)
    center, spread = batch.mean(1), batch.var(1, correction=0)
    scale = (var + spread + 0.1) ** -0.5 * (1 + 0.2 * mean.tanh())
    shift = (mean - center).sin() + (1 + var).log()
    return ((flat - mean[..., None]) * scale[..., None] + shift[..., None]).reshape(x.shape)


def gradients(function: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, g)[0]


def double_gradients(function: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> list[Tensor]:
    """The gradients with respect to x and g of |gradient|^2."""
    x, g = x.detach().requires_grad_(), g.detach().requires_grad_()
    (first,) = torch.autograd.grad(function(x), x, g, create_graph=True)
    return list(torch.autograd.grad(first.square().sum(), (x, g)))


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    error = (actual.double() - expected).abs().max() if actual.numel() else torch.zeros(())
    assert error <= tolerance * max(1.0, expected.abs().max().item()), error


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# --- the functions and their gradients ------------------------------------------------------------


@settings(max_examples=13, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_moments_are_the_mean_and_the_biased_variance(shape: tuple[int, ...], seed: int) -> None:
    torch.manual_seed(seed)
    x = randn(*shape)
    mean, var = moments(x)
    flat = x.reshape(*shape[:2], -1)
    assert_near(mean, flat.mean(2), 1e-12)
    assert_near(var, flat.var(2, correction=0), 1e-12)
    _, grad = gradients(lambda x: torch.stack(moments(x)), x, torch.ones(2, *shape[:2]).double())
    assert_near(grad, (1 + 2 * (flat - flat.mean(2, True))).reshape(shape) / flat.shape[2], 1e-12)


@settings(max_examples=13, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_affine_is_per_sample_and_channel(shape: tuple[int, ...], seed: int) -> None:
    torch.manual_seed(seed)
    x, g = randn(*shape).requires_grad_(), randn(*shape)
    scale, shift = (randn(*shape[:2]).requires_grad_() for _ in range(2))
    each = (*shape[:2], *[1] * (len(shape) - 2))
    expected = x * scale.view(each) + shift.view(each)
    actual = channel_affine(x, scale, shift)
    assert_near(actual, expected, 1e-12)
    wanted = torch.autograd.grad(expected, (x, scale, shift), g)
    for mine, theirs in zip(torch.autograd.grad(actual, (x, scale, shift), g), wanted, strict=True):
        assert_near(mine, theirs, 1e-12)


@settings(max_examples=20, deadline=None)
@given(shape=SHAPES, dtype=st.sampled_from(list(TOLERANCE)), seed=st.integers(0, 99))
def test_normalize_is_its_formula(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    x, g = randn(*shape).to(dtype), randn(*shape).to(dtype)
    y, grad = gradients(lambda x: normalize(x, mix), x, g)
    assert y.dtype == grad.dtype == dtype
    wanted_y, wanted_grad = gradients(reference, x.double(), g.double())
    assert_near(y, wanted_y, TOLERANCE[dtype])
    assert_near(grad, wanted_grad, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("gradient", ["contiguous", "channels last", "expanded", "expanded batch"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_memory_gives_the_same(form: str, gradient: str, dtype: torch.dtype) -> None:
    x, g = FORMS[form](randn(3, 4, 5, 3).to(dtype)), FORMS[gradient](randn(3, 4, 5, 3).to(dtype))
    before = x.clone()
    y, grad = gradients(lambda x: normalize(x, mix), x, g)
    wanted_y, wanted_grad = gradients(reference, x.double(), g.double())
    assert_near(y, wanted_y, TOLERANCE[dtype])
    assert_near(grad, wanted_grad, TOLERANCE[dtype])
    assert torch.equal(x, before)
    for mine, wanted in zip(
        double_gradients(lambda x: normalize(x, mix), x, g),
        double_gradients(reference, x.double(), g.double()),
        strict=True,
    ):
        assert mine.dtype == dtype
        assert_near(mine, wanted, 20 * TOLERANCE[dtype])


def test_gradient_of_a_sum_is_right() -> None:
    """Its gradient is one value, expanded: no stride is positive."""
    x = randn(3, 4, 5, 3)
    one = torch.ones((), dtype=torch.float64).expand_as(x)
    _, grad = gradients(lambda x: normalize(x, mix), x, one)
    assert_near(grad, gradients(reference, x, one)[1], 1e-12)


@pytest.mark.parametrize(
    "shape", [(3, 2), (2, 2, 3), (2, 3, 2, 2), (1, 2, 2, 1, 2), (1, 1, 1), (2, 1, 2, 2)]
)
@pytest.mark.parametrize("form", ["contiguous", "channels last"])
def test_gradients_are_those_of_finite_differences(shape: tuple[int, ...], form: str) -> None:
    if form == "channels last" and len(shape) != 4:
        pytest.skip("a memory format of rank 4")
    x = FORMS[form](randn(*shape)).requires_grad_()
    scale, shift = (randn(*shape[:2]).requires_grad_() for _ in range(2))
    for function, args in [
        (moments, (x,)),
        (channel_affine, (x, scale, shift)),
        (lambda x, scale: normalize(x, lambda m, v: (scale * (v + 1), m * scale)), (x, scale)),
        (lambda x: normalize(x, mix), (x,)),
    ]:
        assert torch.autograd.gradcheck(function, args)
        assert torch.autograd.gradgradcheck(function, args)


@pytest.mark.parametrize("form", ["contiguous", "channels last"])
def test_third_derivatives_are_those_of_the_formula(form: str) -> None:
    start, directions = FORMS[form](randn(2, 3, 2, 2)), randn(3, 2, 3, 2, 2)

    def third(function: Callable[[Tensor], Tensor]) -> Tensor:
        x = start.clone().requires_grad_()
        value = function(x)
        for direction in directions:
            (value,) = torch.autograd.grad((value * direction).sum(), x, create_graph=True)
        return value.detach()

    assert_near(third(lambda x: normalize(x, mix)), third(reference), 1e-10)


# --- values at the edge ---------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["contiguous", "channels last"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_in_its_own_channel(bad: float, form: str) -> None:
    x = FORMS[form](torch.randn(3, 4, 5, 3))
    x[1, 2, 3, 1] = bad
    y = normalize(x, lambda mean, var: (torch.rsqrt(var + 1e-5), torch.zeros_like(mean)))
    assert y[1, 2].isnan().any()
    y[1, 2] = 0
    assert y.isfinite().all()


@pytest.mark.parametrize("form", ["contiguous", "channels last"])
@pytest.mark.parametrize("value", [0.0, 3.7, 1e20])
def test_constant_channels_have_no_variance_and_finite_gradients(value: float, form: str) -> None:
    x = FORMS[form](torch.full((2, 3, 4, 5), value)).requires_grad_()
    mean, var = moments(x)
    assert torch.equal(var, torch.zeros(2, 3)) or (var.sqrt() < 1e-6 * value).all()
    assert torch.allclose(mean, torch.full((2, 3), value))
    y = normalize(x, lambda mean, var: (torch.rsqrt(var + 1e-5), mean * 0))
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (0, 3, 4, 5), (2, 0, 4), (2, 3, 0)])
def test_an_empty_batch_is_no_error(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    y = normalize(x, mix)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    mean, var = moments(x)
    assert mean.shape == var.shape == shape[:2]
    assert channel_affine(x, mean, var).shape == shape


def test_a_vector_is_refused() -> None:
    for function in (moments, lambda x: normalize(x, mix), lambda x: channel_affine(x, x, x)):
        with pytest.raises(ValueError, match="rank 1"):
            function(torch.randn(3))


@pytest.mark.parametrize("form", ["contiguous", "channels last"])
def test_a_mean_of_ten_thousand_standard_deviations_is_no_loss(form: str) -> None:
    x, g = FORMS[form](torch.randn(8, 4, 16, 16) + 1e4), torch.randn(8, 4, 16, 16)

    def batch_norm(x: Tensor) -> Tensor:
        def over_the_batch(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
            center, spread = pooled(mean, var, 0)
            scale = torch.rsqrt(spread + 1e-5)
            return scale, (mean - center) * scale

        return normalize(x, over_the_batch)

    y, grad = gradients(batch_norm, x, g)
    wanted_y, wanted_grad = gradients(
        lambda x: F.batch_norm(x, None, None, training=True), x.double(), g.double()
    )
    assert_near(y, wanted_y, 1e-3)
    assert_near(grad, wanted_grad, 1e-3)


def test_many_positions_lose_no_digits() -> None:
    x = 0.7 + 0.5 * torch.randn(1, 2, 1024, 1024)
    mean, var = moments(x)
    torch.testing.assert_close(mean, x.double().mean((2, 3)).float(), rtol=1e-6, atol=0)
    exact = x.double().var((2, 3), correction=0).float()
    torch.testing.assert_close(var, exact, rtol=2e-6, atol=0)


# --- in a training step ---------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_step_saves_the_input_and_small_tensors(form: str) -> None:
    x = FORMS[form](torch.randn(3, 4, 5, 3)).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        normalize(x, mix)
    assert any(tensor.data_ptr() == x.data_ptr() for tensor in saved)
    assert all(t.data_ptr() == x.data_ptr() or t.numel() <= 3 * 4 for t in saved)


@pytest.mark.parametrize("form", ["contiguous", "channels last"])
def test_backward_can_be_called_again(form: str) -> None:
    x = FORMS[form](torch.randn(3, 4, 5, 3)).requires_grad_()
    g = torch.randn(3, 4, 5, 3)
    y = normalize(x, mix)
    first = torch.autograd.grad(y, x, g, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(y, x, g, retain_graph=True)[0], first)
    other = torch.autograd.grad(y, x, 2 * g)[0]
    assert_near(other, 2 * first.double(), 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_writing_into_the_output_is_allowed(form: str) -> None:
    """As after F.batch_norm, whose output a ReLU often overwrites."""
    x, g = FORMS[form](randn(3, 4, 5, 3)), randn(3, 4, 5, 3)
    before = x.clone()
    y, grad = gradients(lambda x: F.relu_(normalize(x, mix)), x, g)
    wanted_y, wanted_grad = gradients(lambda x: F.relu(reference(x)), x, g)
    assert_near(y, wanted_y, 1e-11)
    assert_near(grad, wanted_grad, 1e-11)
    assert torch.equal(x, before)


def test_writing_into_the_input_before_backward_is_told() -> None:
    x = torch.randn(3, 4, 5, requires_grad=True)
    hidden = x * 1
    y = normalize(hidden, mix)
    hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("needs", ["input", "parameter"])
def test_only_what_needs_a_gradient_gets_one(needs: str) -> None:
    x = torch.randn(3, 4, 5, requires_grad=needs == "input")
    weight = torch.randn(4, requires_grad=needs == "parameter")
    y = normalize(x, lambda mean, var: (weight * torch.rsqrt(var + 1e-5), mean))
    y.square().sum().backward()
    assert (x.grad is None) == (needs != "input")
    assert (weight.grad is None) == (needs != "parameter")


def test_outside_training_it_is_the_same() -> None:
    x = torch.randn(3, 4, 5)
    with torch.no_grad():
        plain = normalize(x, mix)
    with torch.inference_mode():
        inference = normalize(x, mix)
    assert torch.equal(plain, normalize(x, mix)) and torch.equal(plain, inference)
    assert not plain.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_changes_nothing_here(dtype: torch.dtype) -> None:
    """It lowers what comes before, not a normalization: as with torch's own BatchNorm."""
    x, g = torch.randn(3, 4, 5, 3).to(dtype), torch.randn(3, 4, 5, 3).to(dtype)
    outside = gradients(lambda x: normalize(x, mix), x, g)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gradients(lambda x: normalize(x, mix), x, g)
    assert inside[0].dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


@pytest.mark.parametrize("kept", [torch.channels_last, torch.contiguous_format])
def test_the_memory_format_of_the_input_is_kept(kept: torch.memory_format) -> None:
    x = torch.randn(3, 4, 5, 3).to(memory_format=kept).requires_grad_()
    y = normalize(x, mix)
    y.backward(torch.randn(3, 4, 5, 3).to(memory_format=kept))
    assert y.is_contiguous(memory_format=kept) and x.grad.is_contiguous(memory_format=kept)


# --- compiled, exported and transformed -----------------------------------------------------------


class Mixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        mean, var = moments(x)
        return channel_affine(normalize(x, mix), var, mean)


@pytest.mark.parametrize("form", ["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_compiled_it_is_the_same(form: str, dtype: torch.dtype) -> None:
    torch.compiler.reset()
    x, g = FORMS[form](randn(3, 4, 5, 3).to(dtype)), randn(3, 4, 5, 3).to(dtype)
    compiled = torch.compile(Mixed(), fullgraph=True, backend="aot_eager")
    for mine, eager in zip(gradients(compiled, x, g), gradients(Mixed(), x, g), strict=True):
        assert mine.dtype == dtype
        assert_near(mine, eager.double(), 20 * TOLERANCE[dtype])


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (3, 4, 5, 3), (3, 4, 2, 3, 2)], ids=str)
def test_exported_it_takes_any_batch(shape: tuple[int, ...]) -> None:
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(Mixed(), (randn(*shape),), dynamic_shapes=({0: batch},))
    operators = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert not any("native" in operator for operator in operators)
    x = randn(5, *shape[1:])
    assert_near(program.module()(x), Mixed()(x), 1e-11)


def test_traced_it_is_the_same() -> None:
    with pytest.warns(DeprecationWarning):
        traced = torch.jit.trace(Mixed(), (randn(3, 4, 5),))
    x = randn(3, 4, 5)
    assert_near(traced(x), Mixed()(x), 1e-11)


def test_function_transforms_see_through_it() -> None:
    x, tangent = randn(3, 4, 5), randn(3, 4, 5)

    def loss(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: (function(x) * tangent).sum()

    mine, wanted = loss(lambda x: normalize(x, mix)), loss(reference)
    assert_near(torch.func.grad(mine)(x), torch.func.grad(wanted)(x), 1e-11)
    forward, expected = (torch.func.jvp(f, (x,), (tangent,))[1] for f in (mine, wanted))
    assert_near(forward, expected, 1e-11)
    assert_near(torch.func.hessian(mine)(x), torch.func.hessian(wanted)(x), 1e-10)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_backward_can_be_mapped_over_gradients() -> None:
    x, gs = randn(3, 4, 5).requires_grad_(), randn(2, 3, 4, 5)
    y = normalize(x, mix)
    mapped = torch.vmap(lambda g: torch.autograd.grad(y, x, g, retain_graph=True)[0])(gs)
    for row, g in zip(mapped, gs, strict=True):
        assert_near(row, gradients(reference, x, g)[1], 1e-11)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("again", [False, True])
def test_batches_of_gradients_are_taken_at_once(again: bool) -> None:
    x, gs = randn(3, 4, 5).requires_grad_(), randn(2, 3, 4, 5)
    (rows,) = torch.autograd.grad(
        normalize(x, mix), x, gs, is_grads_batched=True, create_graph=again
    )
    for row, g in zip(rows, gs, strict=True):
        assert_near(row, gradients(reference, x, g)[1], 1e-11)


def test_forward_derivatives_are_those_of_the_formula() -> None:
    x, tangent = randn(3, 4, 5), randn(3, 4, 5)
    with forward_ad.dual_level():
        y = normalize(forward_ad.make_dual(x, tangent), mix)
        mine = forward_ad.unpack_dual(y).tangent
    assert_near(mine, torch.func.jvp(reference, (x,), (tangent,))[1], 1e-11)
