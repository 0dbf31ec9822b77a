"""Small networks that several rooms are tested on, each with a pattern that matters."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.norms.pointwise.channel_affine import ChannelAffine, ChannelShift


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every normalization statistics and an affine that do something."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        tensors = {
            **dict(module.named_parameters(recurse=False)),
            **dict(module.named_buffers(recurse=False)),
        }
        is_norm = "Norm" in type(module).__name__
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name == "running_var":
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) * 1.5 + 0.5)
                elif name in ("running_mean", "bias") and is_norm:
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
                elif name == "weight" and is_norm:
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model


def in_eval(model: nn.Module, *args: Any) -> Tensor:
    """The output in eval mode; the flags of the modules are as before."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        output: Tensor = model(*args)
    for module, training in flags:
        module.training = training
    return output


def batch_norms(model: nn.Module) -> list[str]:
    """The paths of what is left of BatchNorms, be it as a scale and shift, or a shift alone."""
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, ChannelAffine, ChannelShift))
    ]


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest deviation, relative to the largest value."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


class ConvBN(nn.Module):
    """conv, bn, relu."""

    def __init__(self, inputs: int = 4, outputs: int = 4, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Residual(nn.Module):
    """Two conv-bn with a 1x1 shortcut, a BatchNorm between two ReLUs, then Linear and BatchNorm1d.

    Of `after` the shift cannot be folded into what is around it; the four others can.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = ConvBN(3, 8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.bn = nn.BatchNorm2d(8)
        self.shortcut = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.after = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 6)
        self.head = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.after(F.relu(self.bn(self.conv(x)) + self.shortcut(x)))
        return self.head(self.fc(F.relu(x).mean((2, 3))))


class Detector(nn.Module):
    """Two exportable parts around control flow that depends on the data; it cannot be exported."""

    def __init__(self) -> None:
        super().__init__()
        self.body = ConvBN()
        self.heads = nn.ModuleList([ConvBN(), ConvBN()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        if x.mean().item() > -1e9:
            x = x + 1
        return self.heads[1](self.heads[0](x))
