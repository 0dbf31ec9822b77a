"""Take BatchNorm out of a segmentation network with two outputs, without labels.

The network is trained on drawn discs and squares, as anybody's would be, then swapped to GroupNorm,
calibrated and recovered on images of several sizes, two at a time.

    python examples/segmentation.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap

CLASSES = ("background", "disc", "square")
RARE = torch.tensor([0.1, 1, 1])  # what an error of each class counts


class Segmenter(nn.Module):
    """Images (N, 3, H, W) to the logits of each pixel, and those of an auxiliary head."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.low = _block(3, width, 1)
        self.high = nn.Sequential(_block(width, 2 * width, 2), _block(2 * width, 2 * width, 1))
        self.head = nn.Conv2d(2 * width, len(CLASSES), 1)
        self.aux = nn.Conv2d(width, len(CLASSES), 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        low = self.low(x)
        out = F.interpolate(self.head(self.high(low)), size=x.shape[-2:], mode="bilinear")
        return {"out": out, "aux": self.aux(low)}


def _block(given: int, made: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(given, made, 5, stride, padding=2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(made), nn.ReLU())


def drawn(count: int, side: int) -> tuple[Tensor, Tensor]:
    """Images (N, 3, side, side) with a disc or a square, and the class of each pixel."""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    center = torch.randint(side // 4, 3 * side // 4, (2, count, 1, 1))
    away = row - center[0], column - center[1]
    kind = torch.randint(1, 3, (count, 1, 1))
    disc = away[0] ** 2 + away[1] ** 2 < (side // 5) ** 2
    square = torch.maximum(away[0].abs(), away[1].abs()) < side // 6
    labels = kind * torch.where(kind == 1, disc, square)
    colour = 0.5 + torch.rand(count, 3, 1, 1)
    return colour * (labels > 0)[:, None] + 0.1 * torch.randn(count, 3, side, side), labels


def right(model: nn.Module, test: list[tuple[Tensor, Tensor]]) -> float:
    """The share of the pixels of discs and squares that are seen as what they are."""
    with torch.no_grad():
        found = torch.cat([(model.eval()(x)["out"].argmax(1) == y)[y > 0] for x, y in test])
    return float(found.double().mean())


def main() -> None:
    torch.manual_seed(0)
    model = Segmenter()
    normswap.finetune(
        model,
        [drawn(16, side) for side in (24, 28, 32) for _ in range(25)],
        steps=250,
        statistics="update",
        loss=lambda output, batch: F.cross_entropy(
            output["out"], batch[1], torch.tensor([0.1, 1, 1])
        ),
        lr=0.05,
    )
    test = [drawn(50, side) for side in (24, 28, 32)]
    images = [drawn(2, side)[0] for side in (24, 28, 32, 36) for _ in range(15)]
    plain = normswap.convert(model, "group_norm", inputs=images[0])
    student = normswap.convert(model, "group_norm", data=images)
    print(f"original    {right(model, test):.1%} of the pixels of shapes")
    print(f"plain swap  {right(plain, test):.1%}")
    print(f"calibrated  {right(student, test):.1%}")
    normswap.recover(student, model, images, steps=100)
    print(f"recovered   {right(student, test):.1%}")


if __name__ == "__main__":
    main()
