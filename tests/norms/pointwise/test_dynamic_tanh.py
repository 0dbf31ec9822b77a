"""Dynamic tanh against its formula, and what it starts with in the place of a BatchNorm."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Residual, error, in_eval, randomise
from torch import Tensor, nn

import normswap as ns


def made(channels: int, affine: bool = True) -> nn.Module:
    module = ns.create("dynamic_tanh", channels, affine=affine).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def formula(x: Tensor, module: nn.Module) -> Tensor:
    """Equation 2, with tanh by exponentials."""
    z = torch.exp(2 * module.alpha * x)
    y = (z - 1) / (z + 1)
    if module.weight is None:
        return y
    shape = (1, -1, *[1] * (x.dim() - 2))
    return y * module.weight.view(shape) + module.bias.view(shape)


@settings(max_examples=10, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    affine=st.booleans(),
    seed=st.integers(0, 999),
)
def test_output_and_gradients_are_the_formulas(shape: list[int], affine: bool, seed: int) -> None:
    torch.manual_seed(seed)
    module = made(shape[1], affine)
    x = (2 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    y, expected = module(x), formula(x, module)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    g, wanted = torch.randn_like(y), [x, *module.parameters()]
    for a, b in zip(
        torch.autograd.grad(y, wanted, g), torch.autograd.grad(expected, wanted, g), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_first_and_second_derivatives_exist() -> None:
    module = made(3)

    def call(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        given = {"alpha": alpha, "weight": weight, "bias": bias}
        return torch.func.functional_call(module, given, (x,))

    x = torch.randn(2, 3, 2, dtype=torch.float64)
    inputs = [each.detach().requires_grad_() for each in (x, *module.parameters())]
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_float32_is_accurate_to_rounding_of_its_bound() -> None:
    x = torch.cat([torch.randn(1000), torch.logspace(-6, 3, 1000)]).view(1, 1, -1)
    y = ns.create("dynamic_tanh", 1)(x)
    assert (y.double() - torch.tanh(0.5 * x.double())).abs().max() <= 3e-7


def test_a_training_step_saves_only_the_input_and_parameters() -> None:
    x, saved = torch.randn(3, 6, 7, 7, requires_grad=True), []
    module = ns.create("dynamic_tanh", 6)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = module(x)
    assert y.requires_grad
    own = x.untyped_storage().data_ptr()
    assert all(t.numel() <= 6 or t.untyped_storage().data_ptr() == own for t in saved)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    module = made(6).to(dtype)
    x = torch.randn(3, 6, 4, 4).to(dtype).requires_grad_()
    y = module(x)
    eps = torch.finfo(dtype).eps
    exact = formula(x.double(), copy.deepcopy(module).double())
    torch.testing.assert_close(y.double(), exact, rtol=eps, atol=eps / 4)
    y.sum().backward()
    assert x.grad.dtype == module.alpha.grad.dtype == dtype


def test_channels_last_copies_and_compiled_forms_give_the_same() -> None:
    module, x = made(6), torch.randn(3, 6, 4, 5, dtype=torch.float64, requires_grad=True)
    y = module(x)
    last = module(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    loaded = ns.create("dynamic_tanh", 6).double()
    loaded.load_state_dict(module.state_dict())
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    others = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded, compiled]
    for z in (last, *(other(x) for other in others)):
        torch.testing.assert_close(z, y, check_stride=False)
        for a, b in zip(
            torch.autograd.grad(z.sum(), x), torch.autograd.grad(module(x).sum(), x), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_exported_to_onnx_it_gives_the_same(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), made(6).float()).eval()
    assert ns.export(model, torch.randn(3, 3, 6, 7), tmp_path / "model.onnx").passed


@pytest.mark.parametrize("shape", [(4,), (3, 1, 5), (3, 5, 4, 4)], ids=str)
def test_an_input_of_other_channels_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        ns.create("dynamic_tanh", 4)(torch.randn(shape))


def test_it_starts_as_the_batch_norm_where_values_are_small() -> None:
    """To first order about 0; alpha is 0.5 in units of the root mean square."""
    bn = randomise(nn.BatchNorm1d(6)).double().eval()
    new = ns.convert(nn.Sequential(bn), "dynamic_tanh")
    x = 1e-4 * torch.randn(8, 6, 3, dtype=torch.float64)
    assert error(in_eval(new, x) - new[0].bias.view(1, 6, 1), bn(x) - bn(0 * x)) <= 1e-6
    assert error(in_eval(new, 0 * x), bn(0 * x)) <= 1e-12
    size = (bn.running_var + bn.running_mean**2).mean().sqrt()
    assert new[0].alpha.item() * size.item() == pytest.approx(0.5)


def test_in_the_place_of_a_layer_norm_it_starts_as_the_paper_does() -> None:
    model = nn.Sequential(nn.Linear(4, 6), randomise(nn.LayerNorm(6)))
    new = ns.convert(model, "dynamic_tanh", inputs=torch.randn(2, 5, 4), include="1")
    x = torch.randn(2, 5, 4)
    expected = torch.tanh(0.5 * model[0](x)) * model[1].weight + model[1].bias
    assert error(in_eval(new, x), expected.detach()) <= 1e-6


def test_calibrated_it_keeps_the_moments_of_every_channel() -> None:
    model, data = randomise(Residual()).eval(), [torch.randn(32, 3, 9, 9) for _ in range(2)]
    new = ns.convert(model, "dynamic_tanh", data=data)
    before, after = (in_eval(each, torch.cat(data)) for each in (model, new))
    assert error(after.mean(0), before.mean(0)) <= 1e-3
    assert error(after.std(0), before.std(0)) <= 1e-3
