"""One small network with every kind of layer that matters, and its example input."""

import pytest
import torch
from torch import nn

from normswap.deploy.export import export


class Block(nn.Module):
    """conv - norm - relu in place, and a shortcut added by the block itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(2, channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.act(self.norm(self.conv(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.layers = nn.Sequential(Block(8), Block(8))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers(torch.relu(self.bn(self.stem(x))))
        return self.fc(self.pool(x).flatten(1))


def randomised_net() -> nn.Module:
    """Always the same, with statistics and affine parameters as training leaves them: no 0 or 1."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var") or (name.endswith("weight") and tensor.ndim == 1):
                nn.init.uniform_(tensor, 0.5, 1.5)
            elif tensor.is_floating_point() and tensor.ndim == 1:
                nn.init.normal_(tensor, std=0.3)
    return model


@pytest.fixture
def net() -> nn.Module:
    return randomised_net()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The content of the network's ONNX file; an export takes a second, so there is only one."""
    path = tmp_path_factory.mktemp("exported") / "m.onnx"
    export(randomised_net(), torch.randn(2, 3, 8, 8), path, validate=False)
    return path.read_bytes()
