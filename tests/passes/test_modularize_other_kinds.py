"""Layer, RMS, group and instance norms called as functions become modules where that is of use."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import error
from torch import Tensor, nn

import normswap as ns
from normswap.passes import Center
from normswap.passes.fold_affine import FoldAffine
from normswap.passes.modularize import Modularize
from normswap.passes.plan import Plan

C = 8
X = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
Norm = Callable[["Layers", Tensor], Tensor]
NORMS: dict[str, tuple[Norm, type[nn.Module]]] = {
    "layer": (lambda m, x: F.layer_norm(x, (C,), m.gain, m.bias, 1e-3), nn.LayerNorm),
    "layer, torch's": (
        lambda m, x: torch.layer_norm(x, [C], weight=m.gain, bias=m.bias),
        nn.LayerNorm,
    ),
    "layer, shape of the input": (
        lambda m, x: F.layer_norm(x, x.shape[-1:], m.gain, m.bias),
        nn.LayerNorm,
    ),
    "layer, no bias": (lambda m, x: F.layer_norm(x, (C,), weight=m.gain), nn.LayerNorm),
    "layer, nothing": (lambda m, x: F.layer_norm(x, (C,)), nn.LayerNorm),
    "layer, a buffer": (lambda m, x: F.layer_norm(x, (C,), m.fixed, m.bias), nn.LayerNorm),
    "rms": (lambda m, x: F.rms_norm(x, (C,), m.gain, 1e-5), nn.RMSNorm),
    "rms, eps of the dtype": (lambda m, x: F.rms_norm(x, (C,), m.gain), nn.RMSNorm),
    "group": (
        lambda m, x: F.group_norm(x.transpose(1, 2), 2, m.gain, m.bias).transpose(1, 2),
        nn.GroupNorm,
    ),
    "instance": (
        lambda m, x: F.instance_norm(x.mT, weight=m.gain, bias=m.bias, eps=1e-2).mT,
        nn.InstanceNorm1d,
    ),
    "instance, nothing": (lambda m, x: F.instance_norm(x.mT).mT, nn.InstanceNorm1d),
    "instance, images": (
        lambda m, x: F.instance_norm(x.mT[..., None], weight=m.gain)[..., 0].mT,
        nn.InstanceNorm2d,
    ),
}


class Layers(nn.Module):
    """Layers among which a normalization is one call."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Linear(6, C), nn.Linear(C, C), nn.Linear(C, 3)
        self.gain = nn.Parameter(torch.rand(C) + 0.5)
        self.bias = nn.Parameter(torch.randn(C))
        self.register_buffer("fixed", torch.rand(C) + 0.5)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.norm(self, self.embed(x))).relu())


def model_of(norm: Norm) -> nn.Module:
    torch.manual_seed(0)
    return Layers(norm).double().eval()


@pytest.fixture(params=NORMS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, type[nn.Module], str]:
    norm, cls = NORMS[request.param]
    return model_of(norm), cls, request.param.partition(",")[0]


def put_in(model: nn.Module, cls: type[nn.Module]) -> list[nn.Module]:
    return [module for module in model.modules() if type(module) is cls]


def test_it_becomes_torchs_module_with_the_same_tensors(case) -> None:
    model, cls, _ = case
    owned = ns.plan(model, Modularize(include="*"), inputs=X).apply(model)
    (norm,) = put_in(owned, cls)
    assert {id(p) for p in norm.parameters()} <= {id(owned.gain), id(owned.bias)}
    for training in (False, True):
        for each in (model, owned):
            each.train(training)
            each.zero_grad()
            each(X).square().sum().backward()
        assert torch.equal(owned(X), model(X))
        before = dict(model.named_parameters())
        for name, parameter in owned.named_parameters():
            mine = before[name].grad
            assert (parameter.grad is None) == (mine is None)
            assert mine is None or torch.equal(parameter.grad, mine)


def test_its_gain_and_bias_go_to_those_that_read_it(case) -> None:
    model, cls, _ = case
    decided = ns.plan(model, FoldAffine(), inputs=X)
    folded = decided.apply(model)
    assert error(folded(X), model(X)) <= 1e-12
    if decided.edits:
        (norm,) = put_in(folded, cls)
        assert getattr(norm, "weight", None) is None or norm.weight.eq(1).all()
        assert getattr(norm, "bias", None) is None or norm.bias.eq(0).all()
    else:
        assert "nothing" in str(NORMS) and not put_in(folded, cls)


def test_it_is_replaced(case) -> None:
    model, cls, kind = case
    inputs, to = X, "rms_norm" if kind != "rms" else "layer_norm"
    converted = ns.convert(model, to, inputs=inputs, include="*norm")
    assert not put_in(converted, cls)
    assert ns.inspect(converted, X).sites[0].kind == to.partition("_")[0]


@pytest.mark.parametrize("name", [name for name in NORMS if name.startswith("layer")])
def test_a_layer_norm_is_centered(name: str) -> None:
    model = model_of(NORMS[name][0])
    centered = ns.center(model, X)
    assert error(centered(X), model(X)) <= 1e-12
    assert [site.kind for site in ns.inspect(centered, X).sites] == ["rms"]


def test_what_is_not_centered_stays_code() -> None:
    def read_elsewhere(model: Layers, x: Tensor) -> Tensor:
        return F.layer_norm(x, (C,), model.gain, model.bias) + x.tanh()

    model = model_of(read_elsewhere)
    with pytest.warns(UserWarning, match="tanh"):
        centered = ns.center(model, X)
    assert [name for name, _ in centered.named_children()] == ["embed", "inner", "head"]


def test_a_plan_is_data_and_a_saved_model_is_built_again(tmp_path: Path) -> None:
    model = model_of(NORMS["layer"][0])
    decided = Plan.from_json(ns.plan(model, Center(), inputs=X).to_json())
    assert error(decided.apply(model, inputs=X)(X), model(X)) <= 1e-12
    ns.save(ns.center(model, X), tmp_path / "centered")
    loaded = ns.load(tmp_path / "centered", source=lambda: model_of(NORMS["layer"][0]))
    assert error(loaded(X), model(X)) <= 1e-12


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (lambda m, x: F.layer_norm(x, (C,), m.gain + 1, m.bias), "computes its weight in forward"),
        (lambda m, x: F.layer_norm(x, x.shape[-1:]), "computes its normalized_shape in forward"),
        (lambda m, x: F.layer_norm(x, (C,), None, m.bias), "has a bias without a gain"),
    ],
)
def test_what_is_computed_in_the_forward_is_left(norm: Norm, reason: str) -> None:
    plan = ns.plan(model_of(norm), Modularize(include="*"), inputs=X)
    assert not plan.edits
    assert reason in plan.left[0].reason


def test_fold_gives_no_module_to_what_has_no_running_statistics() -> None:
    model = nn.Sequential(model_of(NORMS["layer"][0]), nn.Linear(3, 4), nn.BatchNorm1d(5)).double()
    folded = ns.fold(model.eval(), X)
    assert not put_in(folded, nn.LayerNorm)
