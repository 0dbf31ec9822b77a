"""What is folded, or tuned and baked, goes through the quantizers of torch and torchao."""

import copy

import pytest
import torch
from torch import nn

import normswap

BATCH = {0: torch.export.Dim("batch")}


def net() -> nn.Sequential:
    """Each module is called once: torchao's quantizer takes no ReLU that two layers share."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)),
    )
    for _ in range(40):
        model(torch.randn(16, 3, 12, 12) + 1)
    return model.eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(32, 3, 12, 12, generator=torch.Generator().manual_seed(1)) + 1


@pytest.fixture(params=["folded", "tuned"])
def ready(request, x) -> nn.Module:
    """A model without BatchNorm: folded, or trained a step in tune mode, then baked."""
    if request.param == "folded":
        return normswap.fold(net(), x)
    model = normswap.freeze(net(), x, mode="tune")
    model(x).square().mean().backward()
    torch.optim.SGD(model.parameters(), 1e-3).step()
    return normswap.bake(model)


def check(quantized: nn.Module, ready: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        given, expected = quantized(x), ready(x)
    error = (given - expected).square().mean() / expected.var(0).mean()
    assert 0 < error < 0.1


def test_pt2e_of_torchao_quantizes_it(ready, x):
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    program = torch.export.export(ready, (x,), dynamic_shapes=(BATCH,)).module()
    prepared = prepare_pt2e(program, quantizer)
    prepared(x)
    quantized = convert_pt2e(prepared)
    names = [str(node.target) for node in quantized.graph.nodes]
    assert any("dequantize" in name for name in names)
    assert not any("batch_norm" in name for name in names)
    check(quantized, ready, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_qat_of_torchao_trains_it(ready, x):
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    program = torch.export.export(ready, (x,), dynamic_shapes=(BATCH,)).module()
    prepared = prepare_qat_pt2e(program, quantizer)
    train(prepared, ready, x)
    check(convert_pt2e(prepared), ready, x)


def train(prepared: nn.Module, ready: nn.Module, x: torch.Tensor) -> None:
    """Three steps towards what `ready` gives."""
    target = ready(x).detach()
    optimizer = torch.optim.SGD(prepared.parameters(), 1e-3)
    for _ in range(3):
        loss = (prepared(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.filterwarnings("ignore")
def test_fx_quantization_of_torch_quantizes_it(ready, x):
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    prepared = prepare_fx(copy.deepcopy(ready), get_default_qconfig_mapping("x86"), (x,))
    prepared(x)
    check(convert_fx(prepared), ready, x)


@pytest.mark.filterwarnings("ignore")
def test_qat_by_fx_of_torch_trains_it(ready, x):
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

    model = copy.deepcopy(ready).train()
    prepared = prepare_qat_fx(model, get_default_qat_qconfig_mapping("x86"), (x,))
    train(prepared, ready, x)
    check(convert_fx(prepared.eval()), ready, x)
