"""LayerNorms and RMSNorms of everybody's classes are what they compute, in every verb."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

import normswap as ns

C = 6
GENERATOR = torch.Generator().manual_seed(1)
LAST = torch.randn(2, 5, 3, generator=GENERATOR)
FIRST = torch.randn(2, 3, 5, 4, generator=GENERATOR)


class InFloat32(nn.LayerNorm):
    """As CLIP has it."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.type(torch.float32)).type(input.dtype)


class OfFairseq(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        output = F.layer_norm(
            input.float(),
            self.normalized_shape,
            self.weight.float() if self.weight is not None else None,
            self.bias.float() if self.bias is not None else None,
            self.eps,
        )
        return output.type_as(input)


class OnePlusGain(nn.LayerNorm):
    """Its gain is the parameter and 1, as in Nemotron."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class OtherEps(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, 0.1)


class ChannelsFirst(nn.Module):
    """As ConvNeXt has it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.ones(channels)) for _ in range(2))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class WrittenOut(nn.Module):
    """Other names, and the variance by torch.var."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.ones(channels)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) * (variance + 1e-4).rsqrt() * self.gamma + self.beta


class WithoutTensors(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5)


class Functional(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.scale, 1e-3)


class Annotated(nn.Module):
    """That of "The Annotated Transformer": the deviation is unbiased, eps outside the root."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a_2, self.b_2 = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return self.a_2 * (x - mean) / (std + 1e-6) + self.b_2


Build = Callable[[int], nn.Module]
LAYER: dict[str, tuple[Build, int, float]] = {
    "CLIP": (InFloat32, -1, 1e-5),
    "fairseq": (OfFairseq, -1, 1e-5),
    "1 + gain": (OnePlusGain, -1, 1e-5),
    "other eps": (OtherEps, -1, 0.1),
    "channels first": (ChannelsFirst, 1, 1e-6),
    "written out": (WrittenOut, -1, 1e-4),
    "timm": (timm.layers.LayerNorm, -1, 1e-6),
    "timm 2d": (timm.layers.LayerNorm2d, 1, 1e-6),
    "ConvNeXt": (lambda c: ConvNextLayerNorm(c, data_format="channels_first"), 1, 1e-6),
}
RMS: dict[str, tuple[Build, int, float]] = {
    "Llama": (LlamaRMSNorm, -1, 1e-6),
    "T5": (T5LayerNorm, -1, 1e-6),
    "Gemma": (GemmaRMSNorm, -1, 1e-6),
    "Gemma3": (Gemma3RMSNorm, -1, 1e-6),
    "Qwen3": (Qwen3RMSNorm, -1, 1e-6),
    "functional": (Functional, -1, 1e-3),
    "timm 2d": (timm.layers.RmsNorm2d, 1, 1e-6),
    "without tensors": (lambda c: WithoutTensors(), -1, 1e-5),
}
EVERY = [*(("layer", *each) for each in LAYER.values()), *(("rms", *e) for e in RMS.values())]
IDS = [*(f"layer, {name}" for name in LAYER), *(f"rms, {name}" for name in RMS)]


def network(norm: Build, axis: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    def layer(inputs: int, outputs: int) -> nn.Module:
        return nn.Linear(inputs, outputs) if axis == -1 else nn.Conv2d(inputs, outputs, 1)

    model = nn.Sequential(layer(3, C), norm(C), layer(C, C), nn.Tanh(), norm(C))
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model.to(dtype).eval()


def example(axis: int) -> Tensor:
    return LAST if axis == -1 else FIRST


def deviation(model: nn.Module, original: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        expected = original(x)
        return float((model(x) - expected).abs().max() / expected.abs().max())


def gains_folded(model: nn.Module, x: Tensor) -> nn.Module:
    return ns.plan(model, ns.FoldAffine(), inputs=x).apply(model)


# Most of them compute in float32 whatever they are given, so that is what they are compared in.
ROUNDING = 5e-6


@pytest.mark.parametrize(("kind", "build", "axis", "eps"), EVERY, ids=IDS)
def test_inspect_names_them(kind: str, build: Build, axis: int, eps: float) -> None:
    found = ns.inspect(network(build, axis), example(axis)).sites
    assert [(site.name, site.kind, site.channel_axis) for site in found] == [
        ("1", kind, axis),
        ("4", kind, axis),
    ]
    assert all(site.why_not is None and site.num_features == C for site in found)
    assert all(site.eps == pytest.approx(eps, rel=1e-7) for site in found)
    assert all(site.owner == "module" and site.statistics == "sample" for site in found)


@pytest.mark.parametrize(("kind", "build", "axis", "eps"), EVERY, ids=IDS)
def test_a_swap_for_the_same_method_is_the_same_function(
    kind: str, build: Build, axis: int, eps: float
) -> None:
    model, x = network(build, axis), example(axis)
    to = {"layer": "layer_norm", "rms": "rms_norm"}[kind]
    converted = ns.convert(model, to, inputs=x, include="*", per_position=True)
    assert type(converted[1]) is not type(model[1])
    assert deviation(converted, model, x) < ROUNDING


@pytest.mark.parametrize(("kind", "build", "axis", "eps"), EVERY, ids=IDS)
def test_gains_move_into_the_next_layer(kind: str, build: Build, axis: int, eps: float) -> None:
    model, x = network(build, axis), example(axis)
    if not list(model[1].parameters()):
        return
    folded = gains_folded(model, x)
    assert deviation(folded, model, x) < ROUNDING
    assert not torch.equal(folded[2].weight, model[2].weight)
    rest = {name: p.detach() for name, p in folded[1].named_parameters()}
    neutral = [p for p in rest.values() if p.eq(0).all() or p.eq(1).all()]
    assert len(neutral) == len(rest)


@pytest.mark.parametrize(("build", "axis", "eps"), LAYER.values(), ids=LAYER)
def test_center_makes_them_rms_norms(build: Build, axis: int, eps: float) -> None:
    model, x = network(build, axis), example(axis)
    centered = ns.center(model, x)
    assert deviation(centered, model, x) < ROUNDING
    assert [site.kind for site in ns.inspect(centered, x).sites] == ["rms", "layer"]


def test_center_follows_a_residual_stream_through_them() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = WrittenOut(C), nn.Linear(C, 8), nn.Linear(8, C)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(F.gelu(self.up(self.norm(x))))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, C), Block(), Block(), WrittenOut(C), nn.Linear(C, 2))
    model, x = model.double().eval(), LAST.double()
    centered = ns.center(model, x)
    assert deviation(centered, model, x) < 1e-11
    assert {site.kind for site in ns.inspect(centered, x).sites} == {"rms"}


def test_what_only_resembles_a_layer_norm_is_named_and_left() -> None:
    model = network(Annotated, -1)
    found = ns.inspect(model, LAST).sites
    assert [(site.kind, site.channel_axis) for site in found] == [("layer", -1)] * 2
    assert "another eps or factor" in str(found[0].why_not)
    assert deviation(gains_folded(model, LAST), model, LAST) == 0.0


def test_a_gain_of_one_plus_weight_is_taken_over_as_it_acts() -> None:
    model = network(GemmaRMSNorm, -1)
    converted = ns.convert(model, "rms_norm", inputs=LAST, include="1")
    assert torch.allclose(converted[1].weight, model[1].weight + 1)
    folded = gains_folded(model, LAST)
    assert folded[1].weight.eq(0).all()


@pytest.mark.parametrize("norm", [lambda: LlamaRMSNorm(C), lambda: WrittenOut(C)])
def test_recognizing_changes_nothing(norm: Any) -> None:
    module = norm()
    before = dict(vars(module)), {name: t.clone() for name, t in module.state_dict().items()}
    ns.inspect(nn.Sequential(module), torch.randn(2, C))
    assert vars(module).keys() == before[0].keys()
    assert all(torch.equal(t, before[1][name]) for name, t in module.state_dict().items())
