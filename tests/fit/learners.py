"""A small task, a network and runs on it, for the tests of what recover and finetune share."""

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from networks import ConvBN, randomise
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import normswap as ns
from normswap.fit.augment import Shuffled
from normswap.fit.data import Data

CLASSES, SAMPLES = 4, 40
_GENERATOR = torch.Generator().manual_seed(0)
Y = torch.randint(CLASSES, (SAMPLES,), generator=_GENERATOR)
X = torch.randn(SAMPLES, 3, 6, 6, generator=_GENERATOR) + Y.view(-1, 1, 1, 1) * 0.5


class Net(nn.Module):
    """Two residual blocks, dropout and a head: (N, 3, H, W) to logits (N, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBN(3, 8)
        self.blocks = nn.ModuleList([ConvBN(8, 8), ConvBN(8, 8)])
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.drop(x.mean((2, 3))))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return randomise(Net())  # type: ignore[return-value]


def batches(size: int = 8) -> list[tuple[Tensor, Tensor]]:
    return list(zip(X.split(size), Y.split(size), strict=True))


class Augmented(Dataset[Any]):
    """Each sample mirrored, moved or made noisy by a random number of another library."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = X[index] + torch.randn(3, 6, 6) * 0.1 + float(np.random.rand()) * 0.1
        return (x.flip(-1) if random.random() < 0.5 else x), Y[index]


def loader(workers: int = 0, **options: Any) -> DataLoader[Any]:
    if workers:  # a process that was spawned would spawn them, which takes seconds
        options |= {"num_workers": workers, "multiprocessing_context": "fork"}
    return DataLoader(Augmented(), batch_size=8, shuffle=True, **options)


def moved_and_mirrored() -> Shuffled:
    return Shuffled(Data(lambda chosen: X[chosen], Y, torch.arange(SAMPLES), 8), crop=1, flip=True)


EVER = 10**9


class Paced:
    """`data`, of which each batch beyond the first `free` ends in `then`."""

    def __init__(self, data: Iterable[Any], free: int, then: Any) -> None:
        self.data, self.free, self.then = data, free, then

    def __len__(self) -> int:
        return -(-SAMPLES // 8)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.data:
            self.free -= 1
            if self.free < 0:
                self.then()
            yield batch


def learned(
    kind: str, data: Iterable[Any], folder: Path | None = None, *, steps: int = 9, **options: Any
) -> dict[str, Tensor]:
    """The weights and statistics after a run, that goes on from a checkpoint with `resume`."""
    model = net()
    where: dict[str, Any] = {"checkpoint": folder, "save_every": 2, "steps": steps}
    if kind == "finetune":
        ns.finetune(model, data, **where, **options)
    else:
        teacher = model.eval()
        model = ns.convert(teacher, "layer_norm", inputs=X[:2])  # type: ignore[assignment]
        ns.recover(model, teacher, data, **where, **options)
    return model.state_dict()


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
