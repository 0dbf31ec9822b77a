"""`demo:digits`: a small residual BatchNorm network, trained on handwritten digits.

It has the places where a BatchNorm is found in practice: after a convolution and before a relu, at
the end of a residual branch, on its 1x1 shortcut (He et al. 2015, arXiv 1512.03385), after a
depthwise convolution and after the 1x1 one that follows (MobileNet, arXiv 1704.04861), and after a
Linear. `tools/train_digits.py` trains it; `digits.json` records how, and what accuracy came out.
"""

from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from normswap.core.ambient import generators_kept
from normswap.core.errors import NormswapError
from normswap.source.checkpoint import load_checkpoint

WEIGHTS = Path(__file__).with_name("digits.safetensors")
RECORD = Path(__file__).with_name("digits.json")
SPLIT_SEED = 0
TEST_IMAGES = 500


class ConvNormRelu(nn.Sequential):
    """3x3 (or `kernel_size`) convolution, BatchNorm, relu: (N, C, H, W) to (N, C', H, W)."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int = 3, groups: int = 1) -> None:
        super().__init__(
            nn.Conv2d(
                inputs, outputs, kernel_size, padding=kernel_size // 2, groups=groups, bias=False
            ),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a 1x1 shortcut, at stride 2: (N, C, H, W) to (N, C', H/2, W/2)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride=2, bias=False), nn.BatchNorm2d(outputs)
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return self.relu(y)  # type: ignore[no-any-return]


class DigitsNet(nn.Module):
    """Digits (N, 1, 8, 8) with values in [0, 1] to logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(ConvNormRelu(1, 32), ConvNormRelu(32, 32))
        self.residual = ResidualBlock(32, 64)
        self.separable = nn.Sequential(
            ConvNormRelu(64, 64, groups=64), ConvNormRelu(64, 64, kernel_size=1)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.neck = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(inplace=True))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.separable(self.residual(self.stem(x)))
        x = self.pool(x).flatten(1)
        return self.head(self.neck(x))  # type: ignore[no-any-return]


def digits() -> DigitsNet:
    """The trained network, in eval mode."""
    with generators_kept():  # building draws initial weights that are not kept
        model = DigitsNet()
    load_checkpoint(model, WEIGHTS)
    return model.eval()


def digits_data(split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 8, 8), float32 in [0, 1], and labels (N,), int64, of one side of the split.

    The UCI optical recognition of handwritten digits test set (1797 images), as scikit-learn
    ships it, split at a fixed seed in proportion to the classes. `split` is "train" or "test".

    Raises:
        NormswapError: scikit-learn is missing, or the split is another word.
    """
    if split not in ("train", "test"):
        raise NormswapError(f"the digits have no split {split!r}; use 'train' or 'test'")
    try:
        datasets = import_module("sklearn.datasets")
        model_selection = import_module("sklearn.model_selection")
    except ImportError as error:
        raise NormswapError(
            "the digits need scikit-learn; run: pip install 'normswap[demo]'"
        ) from error
    images, labels = datasets.load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = model_selection.train_test_split(
        images, labels, test_size=TEST_IMAGES, stratify=labels, random_state=SPLIT_SEED
    )
    x, y = (train_x, train_y) if split == "train" else (test_x, test_y)
    # The files count the dark pixels of 4 x 4 blocks, hence 0 to 16.
    pixels = torch.as_tensor(x, dtype=torch.float32) / 16
    return pixels.reshape(-1, 1, 8, 8), torch.as_tensor(y, dtype=torch.int64)
