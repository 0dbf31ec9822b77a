"""ResNet-20 and CIFAR-10 as the benchmarks read them: from a folder that is not in the repository.

It holds `resnet20_jpeg.safetensors`, and `train.zip` and `test.zip` with images in one folder per
class. The network is that of `examples/resnet20_cifar.py`.
"""

import runpy
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from normswap.fit.augment import Shuffled
from normswap.fit.data import Data, open_data

EXAMPLE = Path(__file__).parents[1] / "examples" / "resnet20_cifar.py"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PADDING = 4


def pretrained(folder: Path) -> nn.Module:
    """The network with its BatchNorms, in eval mode."""
    model: nn.Module = runpy.run_path(str(EXAMPLE))["resnet20"]().eval()
    model.load_state_dict(load_file(folder / "resnet20_jpeg.safetensors"))
    return model


def augmented(folder: Path, batch_size: int) -> Shuffled:
    """The training images, held in memory: a random crop with padding 4, and a flip."""
    data = open_data(str(folder / "train.zip"), batch_size=500, mean=MEAN, std=STD)
    x, y = (torch.cat(each) for each in zip(*data, strict=True))
    whole = Data(lambda chosen: x[chosen], y, torch.arange(len(x)), batch_size)
    return Shuffled(whole, crop=PADDING, flip=True)


def test_batches(folder: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """All test images and their labels."""
    return list(open_data(str(folder / "test.zip"), batch_size=250, mean=MEAN, std=STD))
