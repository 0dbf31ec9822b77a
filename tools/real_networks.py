"""Four pretrained networks with BatchNorm, each of another task, with their own weights and data.

Their files come from a folder that is not in the repository; it holds

- `efficientnet_lite0.safetensors`, `imagenet_train.zip`, `imagenet_test.zip`: ImageNet, 49 sites;
- `dncnn_s25.safetensors`, `denoise_train.zip`, `denoise_test.zip`: removal of noise, 15 sites;
- `crepe_tiny.safetensors`: the pitch of a sound, 6 sites, probabilities by a sigmoid;
- and, in `cifar10/` or beside it, what `tools/cifar.py` reads: ResNet-20, 19 sites.

A recipe is chosen on the `validation` part, which is no part of what it trains on; the test images
are for the table at its end.
"""

import io
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import zoo_models  # noqa: F401  (timm imports torchvision)
from cifar import labelled_images, pretrained
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from normswap.fit.augment import flipped
from normswap.fit.held_back import MOST

Batches = list[Any]


@dataclass(frozen=True)
class Task:
    """A network, and what it is for.

    Attributes:
        training: batches of inputs, drawn anew each time they are read, without labels.
        labelled: the same batches, as (input, what the network is to return).
        loss: of outputs and that, the mean of a batch, with which such a network is trained.
        validation, test: batches of (input, what is right).
        score: of outputs and what is right, one number per sample; its mean is the measure.
        unit: of the measure.
        agreement: of outputs and the original's, one number per sample.
        calibrating: the number of samples to calibrate on.
    """

    name: str
    model: nn.Module
    training: Iterable[Any]
    labelled: Iterable[Any]
    loss: Callable[[Tensor, Tensor], Tensor]
    validation: Batches
    test: Batches
    score: Callable[[Tensor, Tensor], Tensor]
    unit: str
    agreement: Callable[[Tensor, Tensor], Tensor]
    calibrating: int = MOST

    def measured(self, model: nn.Module, batches: Batches) -> tuple[float, float]:
        """The mean score of `model`, and how far it agrees with the original."""
        scores, agreed = [], []
        with torch.no_grad():
            for x, y in batches:
                output, original = model.eval()(x), self.model(x)
                scores.append(self.score(output, y))
                agreed.append(self.agreement(output, original))
        return float(torch.cat(scores).mean()), float(torch.cat(agreed).mean())


@dataclass(frozen=True)
class Drawn:
    """Batches of other samples each time they are read.

    Attributes:
        sample: gives (inputs, what the network is to return) of a batch, by what is drawn for it:
            the indices of its samples.
        labelled: whether the batches hold both.
    """

    samples: int
    batch_size: int
    sample: Callable[[Tensor], tuple[Tensor, Tensor]]
    labelled: bool = False

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(self.samples)
        for chosen in order[: len(self) * self.batch_size].split(self.batch_size):
            batch = self.sample(chosen)
            yield batch if self.labelled else batch[0]

    def __len__(self) -> int:
        return self.samples // self.batch_size


def _both(samples: int, batch_size: int, sample: Callable[[Tensor], Any]) -> tuple[Drawn, Drawn]:
    """The batches of a task, without and with what is right."""
    drawn = Drawn(samples, batch_size, sample)
    return drawn, replace(drawn, labelled=True)


def _images(path: Path) -> list[tuple[str, Tensor]]:
    """Name and (C, H, W) in [0, 1] of each image in a zip."""
    found = []
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            pixels = np.array(Image.open(io.BytesIO(archive.read(name))), dtype=np.float32) / 255
            pixels = pixels[..., None] if pixels.ndim == 2 else pixels
            found.append((name, torch.from_numpy(pixels).permute(2, 0, 1).contiguous()))
    return found


def _right(output: Tensor, label: Tensor) -> Tensor:
    return 100.0 * (output.argmax(1) == label)


def _same_class(output: Tensor, original: Tensor) -> Tensor:
    return 100.0 * (output.argmax(1) == original.argmax(1))


def efficientnet(folder: Path, batch_size: int = 32) -> Task:
    """EfficientNet-Lite0, ImageNet: the share of images that it gets right, in percent."""
    import timm

    model = timm.create_model("tf_efficientnet_lite0").eval()
    model = model.to(memory_format=torch.channels_last)  # two thirds of the time, on a processor
    model.load_state_dict(load_file(folder / "efficientnet_lite0.safetensors"))

    def opened(name: str) -> tuple[Tensor, Tensor]:
        images = _images(folder / name)
        x = torch.stack([image.expand(3, -1, -1) for _, image in images])
        return (x - 0.5) / 0.5, torch.tensor([int(Path(each).stem) for each, _ in images])

    def window(chosen: Tensor) -> tuple[Tensor, Tensor]:
        top, left = torch.randint(0, 33, (2,)).tolist()
        drawn = used[chosen]
        return flipped(x[drawn][..., top : top + 224, left : left + 224]), y[drawn]

    (x, y), (test_x, test_y) = opened("imagenet_train.zip"), opened("imagenet_test.zip")
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held, used = chosen[:50], chosen[50:]
    middle = (..., slice(16, 240), slice(16, 240))
    return Task(
        "EfficientNet-Lite0",
        model,
        *_both(len(used), batch_size, window),
        F.cross_entropy,
        list(zip(x[held][middle].split(25), y[held].split(25), strict=True)),
        list(zip(test_x[middle].split(25), test_y.split(25), strict=True)),
        _right,
        "%",
        _same_class,
        calibrating=96,
    )


class DnCNN(nn.Module):
    """DnCNN-S (Zhang et al. 2017, arXiv 1608.03981): the noise of an image (N, 1, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, 64, 3, padding=1, bias=False), nn.ReLU(True)]
        for _ in range(15):
            layers += [
                nn.Conv2d(64, 64, 3, padding=1, bias=False),
                nn.BatchNorm2d(64),
                nn.ReLU(True),
            ]
        self.dncnn = nn.Sequential(*layers, nn.Conv2d(64, 1, 3, padding=1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.dncnn(x)
        return found


_NOISE = 25 / 255


def dncnn(folder: Path, batch_size: int = 1) -> Task:
    """DnCNN: the peak signal-to-noise ratio of the images that it cleans, in dB."""
    model = DnCNN().eval()
    model.load_state_dict(load_file(folder / "dncnn_s25.safetensors"))
    images = torch.stack([image for _, image in _images(folder / "denoise_train.zip")])

    def noisy(clean: Iterable[Tensor]) -> Batches:
        drawn = torch.Generator().manual_seed(0)
        noise = [_NOISE * torch.randn(each.shape, generator=drawn) for each in clean]
        return [
            ((c + n)[None], torch.stack([c, n])[None]) for c, n in zip(clean, noise, strict=True)
        ]

    def with_noise(chosen: Tensor) -> tuple[Tensor, Tensor]:
        clean = flipped(images[chosen])
        noise = _NOISE * torch.randn(clean.shape)
        return clean + noise, noise

    def ratio(output: Tensor, clean_and_noise: Tensor) -> Tensor:
        clean, noise = clean_and_noise.unbind(1)
        error = (clean + noise - output).clamp(0, 1) - clean
        return -10 * error.square().flatten(1).mean(1).log10()

    def near(output: Tensor, original: Tensor) -> Tensor:
        error = (output - original).square().flatten(1).sum(1)
        return 10 * (original.square().flatten(1).sum(1) / error).log10()

    return Task(
        "DnCNN",
        model,
        *_both(290, batch_size, with_noise),
        F.mse_loss,
        noisy(images[290:]),
        noisy([image for _, image in _images(folder / "denoise_test.zip")]),
        ratio,
        "dB",
        near,
        calibrating=24,
    )


class Crepe(nn.Module):
    """CREPE tiny (Kim et al. 2018, arXiv 1802.06182): frames (N, 1024) to 360 probabilities."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 128, 16, 16, 16, 32, 64)
        for number, (given, made) in enumerate(pairwise(widths), 1):
            kernel, stride = (512, 4) if number == 1 else (64, 1)
            self.add_module(f"conv{number}", nn.Conv2d(given, made, (kernel, 1), (stride, 1)))
            self.add_module(f"conv{number}_BN", nn.BatchNorm2d(made, eps=0.001))
        self.classifier = nn.Linear(256, 360)

    def forward(self, frames: Tensor) -> Tensor:
        x = frames[:, None, :, None]
        for number in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if number == 1 else (0, 0, 31, 32))
            x = F.relu(self.get_submodule(f"conv{number}")(x))
            x = F.max_pool2d(self.get_submodule(f"conv{number}_BN")(x), (2, 1), (2, 1))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).reshape(-1, 256)))


_LOWEST = 1997.3794084376191  # cents, of the first of the 360 bins, which are 20 wide


def _tones(samples: int, drawn: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Frames (N, 1024) of tones with harmonics and noise, and their pitches in cents."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=drawn)

    pitch = 2000 + 6000 * uniform(samples, 1)  # 32 Hz to 1 kHz
    frequency = 10 * 2 ** (pitch / 1200)
    time = torch.arange(1024) / 16000
    number = torch.arange(1, 11).view(1, -1, 1)
    strength = uniform(samples, 10, 1) / number ** (0.5 + 1.5 * uniform(samples, 1, 1))
    strength = strength * (frequency[..., None] * number < 7800)
    phase = 2 * math.pi * (frequency[..., None] * number * time + uniform(samples, 10, 1))
    sound = (strength * phase.sin()).sum(1)
    noise = torch.randn(samples, 1024, generator=drawn) * 0.3 * uniform(samples, 1)
    sound = sound / sound.std(1, keepdim=True) + noise
    return (sound - sound.mean(1, keepdim=True)) / sound.std(1, keepdim=True), pitch[:, 0]


def crepe(folder: Path, batch_size: int = 64) -> Task:
    """CREPE tiny: the share of frames within 50 cents, in percent."""
    model = Crepe().eval()
    model.load_state_dict(load_file(folder / "crepe_tiny.safetensors"))

    def made(samples: int, seed: int) -> Batches:
        x, y = _tones(samples, torch.Generator().manual_seed(seed))
        return list(zip(x.split(250), y.split(250), strict=True))

    def tones(chosen: Tensor) -> tuple[Tensor, Tensor]:
        frames, pitch = _tones(len(chosen), None)
        apart = 20.0 * torch.arange(360) + _LOWEST - pitch[:, None]
        return frames, torch.exp(-apart.square() / (2 * 25.0**2))  # as the paper, section 2.2

    def cents(output: Tensor) -> Tensor:
        """The mean of the bins around the largest one, weighted by their probabilities."""
        peak = output.argmax(1, keepdim=True)
        near = (torch.arange(360) - peak).abs() <= 4
        weight = output * near
        return (weight @ (20.0 * torch.arange(360))) / weight.sum(1) + _LOWEST

    return Task(
        "CREPE",
        model,
        *_both(32 * batch_size, batch_size, tones),
        F.binary_cross_entropy,
        made(1000, 1),
        made(2000, 2),
        lambda output, y: 100.0 * ((cents(output) - y).abs() <= 50),
        "%",
        lambda output, original: 100.0 * ((cents(output) - cents(original)).abs() <= 50),
    )


def resnet20(folder: Path, batch_size: int = 64) -> Task:
    """ResNet-20 on CIFAR-10: the share of images that it gets right, in percent."""
    here = folder if (folder / "train.zip").exists() else folder.parent / "cifar10"

    def batches(x: Tensor, y: Tensor) -> Batches:
        return list(zip(x.split(250), y.split(250), strict=True))

    def mirrored(chosen: Tensor) -> tuple[Tensor, Tensor]:
        return flipped(x[2000:][chosen]), y[2000:][chosen]

    (x, y), test = labelled_images(here, "train.zip"), labelled_images(here, "test.zip")
    return Task(
        "ResNet-20",
        pretrained(here),
        *_both(len(x) - 2000, batch_size, mirrored),
        F.cross_entropy,
        batches(x[:2000], y[:2000]),
        batches(*test),
        _right,
        "%",
        _same_class,
    )


TASKS: dict[str, Callable[[Path], Task]] = {
    "efficientnet_lite0": efficientnet,
    "dncnn": dncnn,
    "crepe": crepe,
    "resnet20": resnet20,
}
