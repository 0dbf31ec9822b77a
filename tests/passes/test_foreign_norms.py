"""Normalizations of everybody's classes are what they compute, in every verb."""

import copy
import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import normswap as ns
from normswap.graph.norm_modules import before_tail, fixed_statistics, formula
from normswap.graph.recognition import Formula

C = 6
X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
OF_TRANSFORMERS = {
    "conditional_detr": "ConditionalDetr",
    "d_fine": "DFine",
    "dab_detr": "DabDetr",
    "deformable_detr": "DeformableDetr",
    "deimv2": "Deimv2",
    "detr": "Detr",
    "grounding_dino": "GroundingDino",
    "mm_grounding_dino": "MMGroundingDino",
    "pp_doclayout_v2": "PPDocLayoutV2",
    "pp_doclayout_v3": "PPDocLayoutV3",
    "rt_detr": "RTDetr",
    "rt_detr_v2": "RTDetrV2",
    "table_transformer": "TableTransformer",
}


def _of_transformers(name: str) -> Callable[[int], nn.Module]:
    def build(channels: int) -> nn.Module:
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        return getattr(module, f"{OF_TRANSFORMERS[name]}FrozenBatchNorm2d")(channels)

    return build


class Frozen(nn.Module):
    """What the classes below share: four buffers."""

    names = ("weight", "bias", "running_mean", "running_var")

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in self.names:
            self.register_buffer(name, torch.ones(channels))


class Detectron(Frozen):
    """As detectron2 has it."""

    eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            bias = self.bias - self.running_mean * scale
            scale = scale.reshape(1, -1, 1, 1)
            bias = bias.reshape(1, -1, 1, 1)
            return x * scale.to(x.dtype) + bias.to(x.dtype)
        given = self.running_mean, self.running_var, self.weight, self.bias
        return F.batch_norm(x, *given, training=False, eps=self.eps)


class WithoutEps(Frozen):
    def forward(self, x: Tensor) -> Tensor:
        shape = 1, -1, 1, 1
        scale = self.weight / self.running_var.sqrt()
        return x * scale.view(shape) + (self.bias - self.running_mean * scale).view(shape)


class OtherNames(Frozen):
    names = ("gamma", "beta", "moving_mean", "moving_variance")

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.moving_mean[None, :, None, None], self.moving_variance
        inverse = 1 / torch.sqrt(variance + 1e-3)
        n = (x - mean) * inverse[None, :, None, None]
        return self.gamma[None, :, None, None] * n + self.beta[None, :, None, None]


class WithoutAffine(Frozen):
    names = ("mean", "var")

    def forward(self, x: Tensor) -> Tensor:
        d = torch.pow(self.var.view(-1, 1, 1) + 1e-4, -0.5)
        return (x - self.mean.view(-1, 1, 1)) * d


class HalfAffine(Frozen):
    """Its buffers have the shape that they are used in."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        for name in self.names:
            setattr(self, name, torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        n = (x.float() - self.running_mean) * (self.running_var + 2e-5).rsqrt()
        return (n * self.weight + self.bias).to(x.dtype)


class InFloat32(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float()).to(input.dtype)


def _tracking(channels: int) -> nn.Module:
    return nn.InstanceNorm2d(channels, affine=True, track_running_stats=True)


FROZEN: dict[str, Callable[[int], nn.Module]] = {
    "transformers": _of_transformers("detr"),
    "torchvision": FrozenBatchNorm2d,
    "timm": timm.layers.FrozenBatchNormAct2d,
    "detectron2": Detectron,
    "without eps": WithoutEps,
    "other names": OtherNames,
    "without affine": WithoutAffine,
    "buffers of four axes": HalfAffine,
}
FIXED = {**FROZEN, "float32": InFloat32, "instance": _tracking}


def randomise(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.rand(tensor.shape, generator=generator) + 0.5
    return model.eval()


def network(norm: Callable[[int], nn.Module]) -> nn.Module:
    conv, second = nn.Conv2d(3, C, 3, bias=False), nn.Conv2d(C, C, 1)
    model = randomise(
        nn.Sequential(conv, norm(C), nn.ReLU(), second, nn.BatchNorm2d(C), nn.ReLU(), norm(C))
    )
    return model if norm in (HalfAffine, InFloat32) else model.double()


def example(model: nn.Module) -> Tensor:
    return X.to(next(model.parameters()).dtype)


def rounding(model: nn.Module) -> float:
    return 1e-11 if next(model.parameters()).dtype == torch.float64 else 2e-6


@pytest.fixture(params=FIXED)
def fixed(request: pytest.FixtureRequest) -> nn.Module:
    return network(FIXED[request.param])


@pytest.fixture(params=FROZEN)
def frozen(request: pytest.FixtureRequest) -> nn.Module:
    return network(FROZEN[request.param])


def is_same(model: nn.Module, original: nn.Module) -> bool:
    x = example(original)
    with torch.no_grad():
        expected = original(x)
        deviation = (model(x) - expected).abs().max() / expected.abs().max()
    return float(deviation) < rounding(original)


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_what_each_of_transformers_computes(name: str) -> None:
    norm = _of_transformers(name)(C)
    found = formula(norm)
    assert found == Formula(
        "batch", 1, 1e-5, "weight", "bias", "running_mean", "running_var", frozen=True
    )


@pytest.mark.parametrize("given", [True, False], ids=["inputs", "no inputs"])
def test_inspect_counts_them_as_frozen(frozen: nn.Module, given: bool) -> None:
    found = ns.inspect(frozen, example(frozen) if given else None)
    assert [(site.name, site.kind, site.statistics) for site in found.sites] == [
        ("1", "batch", "frozen"),
        ("4", "batch", "running"),
        ("6", "batch", "frozen"),
    ]
    assert all(site.num_features == C for site in found.sites)
    assert {"1", "4"} <= found.foldable


def test_fold_is_exact_and_leaves_none(fixed: nn.Module) -> None:
    folded = ns.fold(fixed, example(fixed))
    assert is_same(folded, fixed)
    assert not {site.kind for site in ns.inspect(folded, example(fixed)).sites} & {
        "batch",
        "instance",
    }
    assert isinstance(folded[1], nn.Identity | nn.Sequential)


def test_tune_mode_is_exact_and_can_be_taken_back(fixed: nn.Module) -> None:
    tuned = ns.freeze(fixed, example(fixed), mode="tune")
    assert is_same(tuned, fixed)
    assert is_same(tuned.train(), fixed)
    thawed = ns.unfreeze(tuned.eval())
    assert is_same(thawed.eval(), fixed)
    assert not any(getattr(module, "frozen_statistics", False) for module in thawed.modules())


def test_thawed_they_train_as_a_batch_norm_with_the_same_keys(frozen: nn.Module) -> None:
    thawed = ns.unfreeze(frozen)
    assert is_same(thawed, frozen)
    norm = thawed[1]
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    if {"running_mean", "weight"} <= dict(frozen[1].named_buffers()).keys():
        assert list(thawed.state_dict()) == list(frozen.state_dict())
    before = norm.running_mean.clone()
    thawed.train()(example(frozen)).sum().backward()
    assert not torch.equal(norm.running_mean, before)
    assert all(p.grad is not None for p in norm.parameters())


@pytest.mark.parametrize("to", ["frozen_batch_norm", "batch_renorm"])
@pytest.mark.parametrize("norm", ["transformers", "timm", "other names", "float32"])
def test_exact_swaps_are_exact(norm: str, to: str) -> None:
    model = network(FIXED[norm])
    converted = ns.convert(model, to, inputs=example(model))
    assert is_same(converted, model)


def test_swaps_for_sample_statistics_keep_gain_bias_and_eps(fixed: nn.Module) -> None:
    converted = ns.convert(fixed, "group_norm", inputs=example(fixed), include="1", groups=2)
    norm = next(m for m in converted[1].modules() if type(m).__name__ == "GroupNorm")
    (site, *_) = ns.inspect(fixed, example(fixed)).sites
    assert norm.eps == pytest.approx(site.eps, rel=1e-6)
    held = dict(fixed[1].named_parameters()) | dict(fixed[1].named_buffers())
    gain = held.get("weight", held.get("gamma"))
    if gain is not None:
        assert torch.equal(norm.weight.detach(), gain.detach().flatten())


def test_frozen_stays_frozen(frozen: nn.Module) -> None:
    done = ns.freeze(frozen, example(frozen))
    assert is_same(done.train(), frozen)


def test_an_instance_norm_that_tracks_statistics_freezes() -> None:
    model = network(_tracking)
    done = ns.freeze(model, example(model))
    assert [site.statistics for site in ns.inspect(done, example(model)).sites] == ["frozen"] * 3
    assert is_same(done.train(), model)
    thawed = ns.unfreeze(done)
    assert type(thawed[1]) is nn.InstanceNorm2d
    assert is_same(thawed.eval(), model)
    with torch.no_grad():
        assert torch.allclose(thawed.train()(X), model.train()(X))


@pytest.mark.parametrize("norm", ["transformers", "other names", "buffers of four axes"])
def test_their_statistics_are_re_estimated_under_their_own_names(norm: str) -> None:
    model = network(FROZEN[norm])
    torch.manual_seed(0)
    data = [torch.randn(4, 3, 8, 8, dtype=example(model).dtype) for _ in range(3)]
    done = ns.reestimate(network(FROZEN[norm]), data)
    with torch.no_grad():
        y = torch.cat([model[0](x) for x in data]).double()
    mean, variance = fixed_statistics(done[1]) or (y, y)
    assert type(done[1]) is type(model[1])
    assert torch.allclose(mean.double().flatten(), y.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    assert torch.allclose(variance.double().flatten(), y.var((0, 2, 3)), rtol=1e-5)


def test_calibration_reads_the_moments_before_the_activation_of_any_class() -> None:
    model = network(timm.layers.FrozenBatchNormAct2d)
    torch.manual_seed(0)
    data = [torch.randn(8, 3, 8, 8).double() for _ in range(2)]
    student = ns.convert(model, "group_norm", inputs=X, include="1", groups=2, data=data)
    assert type(student[1]).__name__ == "Sequential"
    with torch.no_grad():
        seen = [model[0](x) for x in data]
        y = torch.cat([before_tail(model[1], ("drop", "act"), (x,)) for x in seen])
        z = torch.cat([student[1].norm(x) for x in seen])
    assert torch.allclose(z.mean((0, 2, 3)), y.mean((0, 2, 3)), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("norm", ["transformers", "other names"])
def test_the_verbs_that_learn_take_them_for_what_they_are(norm: str) -> None:
    model = network(FROZEN[norm]).float()
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, 3)).eval()
    model = nn.Sequential(model, head).eval()
    torch.manual_seed(0)
    data = [(torch.randn(8, 3, 8, 8), torch.randint(3, (8,))) for _ in range(2)]
    x = data[0][0]
    before = {name: buffer.clone() for name, buffer in model[0][1].named_buffers()}
    tuned = ns.finetune(copy.deepcopy(model), data, steps=4)
    assert not torch.equal(tuned[0][0].weight, model[0][0].weight)
    assert all(torch.equal(b, before[n]) for n, b in tuned[0][1].named_buffers())
    swapped = ns.convert(model, "group_norm", inputs=x, groups=2)
    recovered = ns.recover(copy.deepcopy(swapped), model, data, steps=30)
    with torch.no_grad():
        far, near = ((m(x) - model(x)).square().mean() for m in (swapped, recovered))
    assert near < far


@pytest.mark.parametrize("norm", ["transformers", "other names"])
def test_they_are_exported_and_advised_on(norm: str, tmp_path: Path) -> None:
    model = network(FROZEN[norm]).float()
    x = X.float()
    assert ns.export(ns.fold(model, x), x, tmp_path / "model.onnx").passed
    advice = ns.advise(model, x)
    assert advice.found["normalizations"] == {"batch": 3}
    assert advice.found["fold"]["gone"] == 2
