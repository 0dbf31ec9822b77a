"""What holds for every method that computes a weight."""

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

import normswap as ns
from normswap.norms.registry import method_named
from tests.networks import Residual, error, in_eval, randomise

# Every method with options that make it another function; those that keep a weight, first.
KEEPING: list[tuple[str, dict[str, Any]]] = [
    ("weight_norm", {}),
    ("weight_norm", {"dim": None}),
    ("weight_norm", {"dim": -1}),
    ("spectral_norm", {}),
    ("spectral_norm", {"solver": "svd"}),
    ("spectral_norm", {"conv": "operator", "input_size": 5}),
    ("weight_standardization", {}),
    ("scaled_weight_standardization", {"gamma": 1.7}),
]
METHODS = [
    *KEEPING,
    ("spectral_norm", {"gain": False}),
    ("weight_standardization", {"gain": False, "offset": False}),
    ("scaled_weight_standardization", {"offset": False}),
    ("centered_weight", {"dim": 1}),
]
LAYERS = {
    "linear": lambda: nn.Linear(5, 7),
    "conv1": lambda: nn.Conv1d(3, 5, 3),
    "conv2": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
    "conv3": lambda: nn.Conv3d(2, 3, 2),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2),
    "grouped transposed": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
}


def ids(case: Any) -> str:
    return f"{case[0]} {case[1] or ''}" if isinstance(case, tuple) else str(case)


def register(layer: nn.Module, name: str, options: dict[str, Any]) -> nn.Module:
    """In eval mode, so that nothing is estimated any further."""
    training = layer.training
    share = method_named(name).build(layer.eval(), "weight", **options)
    parametrize.register_parametrization(layer, "weight", share)
    return layer.train(training)


def disturb(layer: nn.Module) -> nn.Module:
    """Move every parameter away from its start, as training would."""
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            generator = torch.Generator().manual_seed(number)
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((0.1 * noise).to(parameter.dtype))
    return layer


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("method", KEEPING, ids=ids)
def test_registering_changes_nothing(method: tuple[str, dict[str, Any]], layer: str) -> None:
    module = LAYERS[layer]().double()
    before = module.weight.detach().clone()
    register(module.eval(), *method)
    assert error(module.weight, before) < 1e-14


@settings(deadline=None, max_examples=8)
@given(
    scale=st.sampled_from([1e-30, 1e-6, 1.0, 1e6]),
    mean=st.floats(-100, 100),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("method", KEEPING, ids=ids)
def test_registering_keeps_any_weight(
    method: tuple[str, dict[str, Any]], scale: float, mean: float, seed: int
) -> None:
    module = nn.Conv2d(3, 4, (1, 3)).double().eval()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        module.weight.copy_(torch.randn(4, 3, 1, 3, generator=generator, dtype=torch.float64))
        module.weight.add_(mean).mul_(scale)
    before = module.weight.detach().clone()
    register(module, *method)
    assert error(module.weight, before) < 1e-12


@pytest.mark.parametrize("method", KEEPING, ids=ids)
def test_a_weight_of_zeros_is_kept_and_learns(method: tuple[str, dict[str, Any]]) -> None:
    module = nn.Conv2d(3, 4, 3)
    nn.init.zeros_(module.weight)
    register(module, *method)
    assert module.weight.abs().max() == 0
    module(torch.randn(2, 3, 5, 5)).square().sum().backward()
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("method", KEEPING, ids=ids)
def test_a_weight_can_be_assigned(method: tuple[str, dict[str, Any]]) -> None:
    module = register(nn.Conv2d(3, 4, 3).double().eval(), *method)
    other = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    module.weight = other
    assert error(module.weight, other) < 1e-13


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_gradients_of_both_orders(method: tuple[str, dict[str, Any]], layer: str) -> None:
    module = LAYERS[layer]().double().eval()
    share = method_named(method[0]).build(module, "weight", **method[1])
    originals = share.right_inverse(module.weight.detach())
    originals = originals if isinstance(originals, tuple) else (originals,)
    leaves = [(each + 0.1 * torch.randn_like(each)).requires_grad_() for each in originals]
    assert torch.autograd.gradcheck(share.eval(), leaves, fast_mode=True)
    if method[1].get("solver") != "svd":  # ill-conditioned at near singular values
        assert torch.autograd.gradgradcheck(share, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_half_precision(method: tuple[str, dict[str, Any]], dtype: torch.dtype) -> None:
    wide = register(nn.Conv2d(3, 4, 3).double().eval(), *method)
    module = register(copy_of(wide, method).to(dtype).eval(), *method)
    assert module.weight.dtype == dtype
    tolerance = 8 * torch.finfo(dtype).eps
    assert error(module.weight.double(), wide.weight.detach()) < tolerance
    module.weight.float().sum().backward()
    module.train()
    assert module.weight.isfinite().all()


def copy_of(layer: nn.Module, method: tuple[str, dict[str, Any]]) -> nn.Module:
    """The same layer before its weight was parametrized."""
    plain = nn.Conv2d(3, 4, 3).to(layer.weight.dtype)
    chain = layer.parametrizations["weight"]  # type: ignore[index]
    if method in KEEPING:
        original = layer.weight
    else:
        original = chain.original if chain.is_tensor else chain.original1  # type: ignore[union-attr]
    with torch.no_grad():
        plain.weight.copy_(original)  # type: ignore[arg-type]
    return plain


@pytest.mark.parametrize("layer", ["conv2", "transposed", "grouped transposed"])
@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_memory_format_stays(method: tuple[str, dict[str, Any]], layer: str) -> None:
    module = disturb(register(LAYERS[layer]().double(), *method)).eval()
    last = register(LAYERS[layer]().double().to(memory_format=torch.channels_last), *method).eval()
    last.load_state_dict(module.state_dict())
    assert last.weight.is_contiguous(memory_format=torch.channels_last)
    assert error(last.weight, module.weight) < 1e-13


@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_copies_and_state_round_trip(method: tuple[str, dict[str, Any]]) -> None:
    module = disturb(register(nn.Conv2d(3, 4, 3), *method))
    for _ in range(2):
        module(torch.randn(2, 3, 5, 5))  # the estimates of a spectral norm move
    module.eval()
    twin = copy.deepcopy(module)
    loaded = register(nn.Conv2d(3, 4, 3), *method).eval()
    loaded.load_state_dict(module.state_dict())
    assert torch.equal(twin.weight, module.weight)
    assert torch.equal(loaded.weight, module.weight)
    before = module.weight.detach().clone()
    disturb(twin)
    assert torch.equal(module.weight, before)
    share = module.parametrizations["weight"][0]  # type: ignore[index]
    assert type(pickle.loads(pickle.dumps(share))) is type(share)


@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_compiles_into_one_graph(method: tuple[str, dict[str, Any]]) -> None:
    torch.compiler.reset()
    module = disturb(register(nn.Conv2d(3, 4, 3).double(), *method))
    other = copy.deepcopy(module)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert error(compiled(x), module(x)) < 1e-12
    compiled(x).square().sum().backward()
    module(x).square().sum().backward()
    for ours, theirs in zip(other.parameters(), module.parameters(), strict=True):
        assert error(ours.grad, theirs.grad) < 1e-12


@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_nothing_but_the_weight_is_saved(method: tuple[str, dict[str, Any]]) -> None:
    module = register(nn.Conv2d(16, 12, 3).double(), *method)
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        weight = module.weight
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    if method[1].get("solver") == "svd":
        own |= {pointer for pointer, t in saved.items() if t.dim() == 2}  # U and V
    large = [t for pointer, t in saved.items() if pointer not in own and t.numel() > 12 * 16 * 5]
    assert not large
    assert weight.requires_grad


class _Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 4, 3, padding=1), nn.ConvTranspose2d(4, 6, 2, 2)
        self.bn, self.fc = nn.BatchNorm2d(6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.up(self.conv(x).relu())).relu().mean((2, 3)))


@pytest.mark.parametrize(
    "method", [METHODS[i] for i in (0, 3, 6, 7, -1)], ids=ids
)  # one of each name
def test_baked_model_is_exported(method: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    model = randomise(_Small()).eval()
    for layer in (model.conv, model.up, model.fc):
        disturb(register(layer, *method))
    x = torch.randn(2, 3, 5, 5)
    report = ns.export(model, x, tmp_path / "model.onnx")
    assert report.passed
    baked = ns.bake(model)
    assert error(in_eval(baked, x), in_eval(model, x)) == 0
    assert not any(parametrize.is_parametrized(module) for module in baked.modules())


@pytest.mark.parametrize("method", KEEPING, ids=ids)
def test_a_model_keeps_its_function_and_folds(method: tuple[str, dict[str, Any]]) -> None:
    """A BatchNorm folds into a weight that is computed, and what results is exact."""
    model = randomise(Residual()).double()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    expected = in_eval(model, x)
    parametrized = ns.plan(model, ns.Parametrize(method[0], **method[1])).apply(model)
    assert error(in_eval(parametrized, x), expected) < 1e-13
    assert error(in_eval(ns.fold(parametrized, x), x), expected) < 1e-12


def test_registry_names_the_methods_of_this_family() -> None:
    names = {name for name, method in ns.methods().items() if method.kind == "weight"}
    assert names >= {name for name, _ in METHODS}


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    yield
    torch.compiler.reset()
