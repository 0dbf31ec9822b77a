"""Detection and segmentation in batches of one or two: converted, calibrated and recovered."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import ConvBN, randomise
from torch import Tensor, nn

import normswap as ns
from normswap.fit.recover import recovery
from normswap.fit.training import Settings


class Detector(nn.Module):
    """A list of images to what is found in each, as torchvision's detectors give it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(ConvBN(3, 8), nn.MaxPool2d(2), ConvBN(8, 8))
        self.score, self.box = nn.Conv2d(8, 3, 1), nn.Conv2d(8, 4, 1)

    def forward(self, images: list[Tensor], targets: Any = None) -> list[dict[str, Tensor]]:
        found = []
        for image in images:
            y = self.body(image[None])
            scores, labels = self.score(y)[0].flatten(1).softmax(0).max(0)
            kept = scores > scores.median()  # as many as the image makes them
            boxes = self.box(y)[0].flatten(1).T
            found.append({"boxes": boxes[kept], "labels": labels[kept], "scores": scores[kept]})
        return found


class Segmenter(nn.Module):
    """Images to logits of each pixel, and those of an auxiliary head."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = ConvBN(3, 8), ConvBN(8, 8)
        self.head, self.aux = nn.Conv2d(8, 5, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        low = self.low(x)
        out, aux = 6 * self.head(self.high(F.max_pool2d(low, 2))), 6 * self.aux(low)
        return {"out": F.interpolate(out, size=x.shape[-2:], mode="bilinear"), "aux": aux}


def images(count: int) -> list[Tensor]:
    return [torch.rand(3, 12, 12) + 0.3 * torch.randn(3, 1, 1) for _ in range(count)]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_a_small_batch_is_enough(task: str, size: int) -> None:
    torch.manual_seed(0)
    if task == "detection":
        teacher: nn.Module = Detector()
        data: list[Any] = [(images(size), [{}] * size) for _ in range(40)]
    else:
        teacher = Segmenter()
        data = [torch.stack(images(size)) for _ in range(40)]
    teacher = ns.reestimate(randomise(teacher), data).eval()
    student = ns.convert(teacher, "layer_norm", data=data)
    done = recovery(student, teacher, data, Settings(steps=50))
    assert done.loss == (
        "the states of the blocks alone"
        if task == "detection"
        else "'out': logits by Kullback-Leibler divergence, "
        "'aux': logits by Kullback-Leibler divergence"
    )
    assert done.student is student and dict(done.curve)[done.step] < 0.9 * done.curve[0][1]
