"""The methods with statistics of each sample, against their published formulas."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_formulas import CASES, Case
from torch import Tensor, nn

import normswap as ns
from normswap.norms.sample.rms import RMSNorm

OWN = [case for case in CASES if case.own]
each = pytest.mark.parametrize("case", CASES, ids=str)
each_own = pytest.mark.parametrize("case", OWN, ids=str)


def drawn(shape: tuple[int, ...]) -> Tensor:
    """Samples and channels that differ in mean and size, in float64."""
    spread = torch.rand(*shape[:2], *[1] * (len(shape) - 2), dtype=torch.float64) + 0.5
    return (torch.randn(shape, dtype=torch.float64) + torch.randn_like(spread)) * spread


@each
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_output_and_gradients_are_the_formulas(case: Case, data: st.DataObject) -> None:
    rank = data.draw(st.sampled_from(case.ranks))
    samples = data.draw(st.integers(1, 4))
    channels = 2 * data.draw(st.integers(1, 4))
    places = [data.draw(st.integers(2, 5)) for _ in range(rank - 2)]
    torch.manual_seed(data.draw(st.integers(0, 999)))
    module = case.module(channels).train(data.draw(st.booleans()))
    x = drawn((samples, channels, *places)).requires_grad_()
    y, expected = module(x), case.expected(x, module)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-10)
    g = torch.randn_like(y)
    wanted = [x, *module.parameters()]
    actual = torch.autograd.grad(y, wanted, g)
    for a, b in zip(actual, torch.autograd.grad(expected, wanted, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@each_own
@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 2, 3)], ids=str)
def test_first_and_second_derivatives_exist(case: Case, shape: tuple[int, ...]) -> None:
    if len(shape) not in case.ranks:
        return
    module = case.module(4)
    names = [name for name, _ in module.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(module, given, (x,))

    inputs = [each.detach().requires_grad_() for each in (drawn(shape), *module.parameters())]
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@each
def test_a_training_step_saves_the_input_and_small_tensors(case: Case) -> None:
    x = torch.randn(3, 6, 7, 7, requires_grad=True)
    module = case.module(6).float()
    others: list[Tensor] = []

    def pack(saved: Tensor) -> Tensor:
        if saved.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
            others.append(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        y = module(x)
    assert y.requires_grad
    assert all(saved.numel() <= 3 * 7 * 7 for saved in others)


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_half_precision_is_rounded_once(
    case: Case, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    module = case.module(6)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype).double()
    x = drawn((3, 6, 4, 5)).to(dtype).contiguous(memory_format=layout).requires_grad_()
    half = copy.deepcopy(module).to(dtype)
    y, exact = half(x), case.expected(x.double(), module)
    assert y.dtype == dtype
    # PyTorch's own kernels round the normalized value before the gain in some of these.
    roundings = 2 if "norm" in type(half).__module__ and "torch" in type(half).__module__ else 1
    tolerance = (4 if case.options.get("per_position") else roundings) * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.dtype == dtype and grad.isfinite().all()


@each
def test_channels_last_is_kept_and_gives_the_same(case: Case) -> None:
    module = case.module(6)
    x = drawn((3, 6, 4, 5)).requires_grad_()
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    y, z = module(x), module(last)
    assert y.is_contiguous()
    assert z.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(z, y.contiguous(memory_format=torch.channels_last))
    g = torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad(z, [last, *module.parameters()], g),
        torch.autograd.grad(y, [x, *module.parameters()], g),
        strict=True,
    ):
        torch.testing.assert_close(a, b, check_stride=False)


@each
def test_copies_pickles_and_state_dicts_give_the_same(case: Case) -> None:
    module, x = case.module(6), drawn((3, 6, 5))
    loaded = ns.create(case.name, 6, **case.options).double()
    loaded.load_state_dict(module.state_dict())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert torch.equal(other(x), module(x))


def test_compiled_without_a_graph_break_they_give_the_same() -> None:
    model = nn.Sequential(*[case.module(6) for case in OWN])
    x = drawn((3, 6, 4, 5)).requires_grad_()
    y = model(x)
    z = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(z, y)
    wanted = [x, *model.parameters()]
    for a, b in zip(
        torch.autograd.grad(z.sum(), wanted), torch.autograd.grad(y.sum(), wanted), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_exported_to_onnx_they_give_the_same(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), *[case.module(6).float() for case in CASES]).eval()
    assert ns.export(model, torch.randn(3, 3, 6, 7), tmp_path / "all.onnx").passed


@pytest.mark.parametrize(
    "case", [case for case in OWN if case.name != "local_response_norm"], ids=str
)
@pytest.mark.parametrize("shape", [(4,), (3, 1, 5, 5), (3, 5, 4, 4)], ids=str)
def test_an_input_of_other_channels_is_refused_in_one_line(
    case: Case, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="expected") as raised:
        case.module(4).float()(torch.randn(shape))
    assert "\n" not in str(raised.value)


@each
def test_an_empty_batch_passes(case: Case) -> None:
    x = torch.randn(0, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    y = case.module(6)(x)
    y.sum().backward()
    assert y.shape == x.shape


@pytest.mark.parametrize("name", ["rms_norm", "filter_response_norm", "global_response_norm"])
def test_gradients_can_be_mapped_over(name: str) -> None:
    norm = ns.create(name, 4)
    x, grads = torch.randn(3, 4, 5, 2, requires_grad=True), torch.randn(6, 3, 4, 5, 2)
    y = norm(x)
    (mapped,) = torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in grads]
    torch.testing.assert_close(mapped, torch.stack(one_by_one))


def test_rms_norm_takes_a_single_vector_as_layer_norm_does() -> None:
    x = torch.randn(4, requires_grad=True)
    norm = RMSNorm(4, per_position=True, channel_axis=-1)
    torch.testing.assert_close(norm(x), torch.rms_norm(x, (4,), eps=1e-5))
