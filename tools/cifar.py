"""ResNet-20 and CIFAR-10 as the benchmarks read them: from a folder that is not in the repository.

It holds `resnet20_jpeg.safetensors` and `resnet20.th`, before and after it was fine-tuned to the
JPEG images, and those, `train.zip` and `test.zip`, in one folder per class. The network is that of
`examples/resnet20_cifar.py`.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from normswap.fit.augment import Shuffled
from normswap.fit.data import Data, open_data
from normswap.source.factory import call_factory

EXAMPLE = Path(__file__).parents[1] / "examples" / "resnet20_cifar.py"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PADDING = 4


def pretrained(folder: Path) -> nn.Module:
    """The network with its BatchNorms, in eval mode."""
    return _resnet20(load_file(folder / "resnet20_jpeg.safetensors"))


def published(folder: Path) -> nn.Module:
    """The network as it was trained on the lossless images, in eval mode."""
    state = torch.load(folder / "resnet20.th", map_location="cpu", weights_only=True)["state_dict"]
    return _resnet20({name.removeprefix("module."): value for name, value in state.items()})


def _resnet20(state: dict[str, Tensor]) -> nn.Module:
    model: nn.Module = call_factory(f"{EXAMPLE}:resnet20")  # of a module, so that it can be pickled
    model.load_state_dict(state)
    return model.eval()


def labelled_images(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    """All images of a zip, (N, 3, 32, 32), and their labels, (N,)."""
    data = open_data(str(folder / name), batch_size=500, mean=MEAN, std=STD)
    x, y = (torch.cat(each) for each in zip(*data, strict=True))
    return x, y


def augmented(folder: Path, batch_size: int) -> Shuffled:
    """The training images, held in memory: a random crop with padding 4, and a flip."""
    x, y = labelled_images(folder, "train.zip")
    whole = Data(lambda chosen: x[chosen], y, torch.arange(len(x)), batch_size)
    return Shuffled(whole, crop=PADDING, flip=True)


def test_batches(folder: Path) -> list[tuple[Tensor, Tensor]]:
    """All test images and their labels."""
    return list(open_data(str(folder / "test.zip"), batch_size=250, mean=MEAN, std=STD))
