"""Accuracy on images that are corrupted: new statistics from a few of them, or a swap without any.

    python tools/bench_shift.py FOLDER [--part validation] [--images 1000] [--priors 0 16 64 256]

FOLDER is as `tools/cifar.py` says. The corruptions of CIFAR-10-C at its severity of 5 (Hendrycks &
Dietterich 2019, arXiv 1903.12261; the numbers are those of its authors' `make_cifar_c.py`) are made
here. For each of them: ResNet-20 with its own statistics; with those of 16, 64 or 256 corrupted
images without labels, mixed with its own as if these were of N samples (`reestimate(prior=N)`,
Schneider et al. 2020, arXiv 2006.16971); and swapped for a method that takes its statistics from
each sample, calibrated and recovered on clean images.

`--part validation` takes the images, and those that give the statistics, from the first 2,000
training images, which nothing is recovered on: N is chosen there.
"""

import argparse
import copy
import io
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from cifar import MEAN, STD, labelled_images, pretrained
from PIL import Image
from real_networks import resnet20
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

import normswap
from normswap.fit.evaluate import accuracy

SAMPLES = (16, 64, 256)
METHODS = ("layer_norm", "group_norm:4")
STEPS = 200  # of recover


def _noise(x: Tensor) -> Tensor:
    return x + 0.1 * torch.randn(x.shape)


def _shot(x: Tensor) -> Tensor:
    return torch.poisson(50 * x) / 50


def _blur(x: Tensor) -> Tensor:
    return gaussian_blur(x, [9, 9], [1.0, 1.0])


def _contrast(x: Tensor) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return mean + 0.15 * (x - mean)


def _brightness(x: Tensor) -> Tensor:
    """The value of hue, saturation and value, plus 0.3."""
    value = x.amax(1, keepdim=True)
    brighter = (value + 0.3).clamp(max=1)
    return torch.where(value > 0, x / value.clamp(min=1e-6) * brighter, brighter)


def _of_pictures(change: Callable[[Image.Image], Image.Image]) -> Callable[[Tensor], Tensor]:
    def changed(x: Tensor) -> Tensor:
        pictures = (255 * x).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        found = [np.asarray(change(Image.fromarray(each))) for each in pictures]
        return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2) / 255

    return changed


def _pixelate(picture: Image.Image) -> Image.Image:
    small = picture.resize((int(32 * 0.65),) * 2, Image.Resampling.BOX)
    return small.resize((32, 32), Image.Resampling.BOX)


def _jpeg(picture: Image.Image) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=40)
    return Image.open(file)


CORRUPTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "Gaussian noise": _noise,
    "shot noise": _shot,
    "Gaussian blur": _blur,
    "contrast": _contrast,
    "brightness": _brightness,
    "pixelate": _of_pictures(_pixelate),
    "JPEG": _of_pictures(_jpeg),
}


def corrupted(x: Tensor, name: str) -> Tensor:
    """Normalized images (N, 3, 32, 32), corrupted as images of [0, 1]."""
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (MEAN, STD))
    torch.manual_seed(0)
    changed = CORRUPTIONS[name]((x * std + mean).clamp(0, 1)).clamp(0, 1)
    return (changed - mean) / std


def swapped(folder: Path, method: str) -> nn.Module:
    """ResNet-20 with another normalization, recovered on clean images."""
    task = resnet20(folder)
    torch.manual_seed(0)
    data = list(islice(task.training, 8))
    to, _, groups = method.partition(":")
    options = {"groups": int(groups)} if groups else {}
    student = normswap.convert(task.model, to, data=data, **options)
    return normswap.recover(student, task.model, task.training, steps=STEPS).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--part", default="test", choices=["test", "validation"])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--priors", type=float, nargs="+", default=[0, 16, 64, 256])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    original = pretrained(arguments.folder)
    x, y = labelled_images(
        arguments.folder, "test.zip" if arguments.part == "test" else "train.zip"
    )
    if arguments.part == "validation":
        x, y = x[:2000], y[:2000]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    tested, unlabelled = order[: arguments.images], order[arguments.images :][: max(SAMPLES)]
    students = {method: swapped(arguments.folder, method) for method in METHODS}

    priors = [(n, prior) for n in SAMPLES for prior in arguments.priors]
    found: dict[str, list[float]] = {}
    for name in CORRUPTIONS:
        batches = list(
            zip(corrupted(x[tested], name).split(250), y[tested].split(250), strict=True)
        )
        target = corrupted(x[unlabelled], name)
        adapted = [
            normswap.reestimate(copy.deepcopy(original), [target[:n]], prior=prior)
            for n, prior in priors
        ]
        models = [original, *adapted, *students.values()]
        found[name] = [100 * accuracy(model, batches) for model in models]

    table = Table("statistics of", *found, "mean of the corruptions")
    names = ["training", *(f"{n} images, N = {prior:g}" for n, prior in priors), *students]
    for name, row in zip(names, zip(*found.values(), strict=True), strict=True):
        mean = sum(row[1:]) / len(row[1:])
        table.add_row(name, *(f"{each:.1f}" for each in row), f"{mean:.1f}")
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
