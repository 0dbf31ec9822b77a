"""Detection and segmentation in batches of one or two: converted, calibrated and recovered."""

import json
from pathlib import Path
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
            kept = scores > 0.4  # as many as the image and the normalization make them
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


def images(count: int, size: tuple[int, int] | None = None) -> list[Tensor]:
    """So many of one size, or each of its own."""
    drawn = [size or torch.randint(8, 17, (2,)).tolist() for _ in range(count)]
    return [torch.rand(3, *each) + 0.3 * torch.randn(3, 1, 1) for each in drawn]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_a_small_batch_of_any_size_is_enough(task: str, size: int) -> None:
    torch.manual_seed(0)
    if task == "detection":
        teacher: nn.Module = Detector()
        data: list[Any] = [(images(size), [{}] * size) for _ in range(40)]
    else:
        teacher = Segmenter()
        sides = [2 * int(half) for half in torch.randint(4, 9, (40,))]
        data = [torch.stack(images(size, (side, 24 - side))) for side in sides]
    teacher = ns.reestimate(randomise(teacher), data).eval()
    student = ns.convert(teacher, "layer_norm", data=data)
    done = recovery(student, teacher, data, Settings(steps=150))
    assert done.loss == (
        "the states of the blocks alone"
        if task == "detection"
        else "'out': logits by Kullback-Leibler divergence, "
        "'aux': logits by Kullback-Leibler divergence"
    )
    assert done.student is student and dict(done.curve)[done.step] < 0.9 * done.curve[0][1]


CODE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.low = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.mask, self.name = nn.Conv2d(8, 5, 1), nn.Linear(8, 3)

    def forward(self, x):
        low = self.low(x)
        return {"mask": 6 * self.mask(low), "embedding": self.name(low.mean((2, 3)))}


def build():
    torch.manual_seed(0)
    model = Net()
    for x in data():
        model(x)
    return model.eval()


def data():
    drawn = torch.Generator().manual_seed(0)
    sides = (2 * torch.randint(4, 9, (40,), generator=drawn)).tolist()
    return [torch.rand(1, 3, s, 24 - s, generator=drawn) for s in sides]
"""


def test_the_command_takes_outputs_of_dicts_and_images_of_any_size(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mask_net.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    words = ("mask_net.py:build", "--data", "mask_net:data")
    assert run("convert", *words, "--to", "layer_norm", "--recover", "60", "--out", "out")[0] == 0
    found = json.loads(Path("out/report.json").read_text())["training"]["recovery"]
    assert found["compared"].startswith("'mask': logits by Kullback-Leibler divergence, 'embedding")
    assert min(each for _, each in found["curve"]) < 0.9 * found["curve"][0][1]
    words = ("mask_net.py:build", "out", "--source-b", "mask_net.py:build", *words[1:])
    assert run("compare", *words, "--out", "compared")[0] == 0
