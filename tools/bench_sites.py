"""How the cost of a rewrite grows with the number of normalizations.

    python tools/bench_sites.py [--sites 10 100 1000] [--rounds 3] [--networks GLOB ...]

The networks are chains of residual blocks with few channels, so that all of the time goes into
seeing the model and changing it: `residual` with BatchNorm before the addition (arXiv 1512.03385),
`pre-activation` with BatchNorm before the convolutions (1603.05027), whose BatchNorms all normalize
one stream and do not fold. Processor time, one thread, the least of the rounds, in milliseconds per
site: of the whole verb, of torch.export in it (torch's own cost of a graph), of the check of the
result beside the original (what `check=False` saves), and of the rest, which is ours. `growth` is
the slope of log(time) over log(sites) between the last two sizes; 1 is linear.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import normswap

CHANNELS, SIDE = 4, 4


class Residual(nn.Module):
    """Two convolutions with a BatchNorm each, and their input added."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(CHANNELS)
        self.conv2 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(CHANNELS)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(x + self.bn2(self.conv2(y)))


class PreActivation(Residual):
    """Two convolutions, each after BatchNorm and ReLU, and their input added."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.relu(self.bn1(x)))
        return x + self.conv2(self.relu(self.bn2(y)))


NETWORKS = {"residual": Residual, "pre-activation": PreActivation}


def chain(network: str, sites: int) -> nn.Module:
    """A network with so many BatchNorms, an even number."""
    stem = nn.Conv2d(CHANNELS, CHANNELS, 1)
    return nn.Sequential(stem, *(NETWORKS[network]() for _ in range(sites // 2))).eval()


Verb = Callable[[nn.Module], nn.Module]
X = torch.zeros(2, CHANNELS, SIDE, SIDE)
VERBS: dict[str, Verb] = {
    "convert": partial(normswap.convert, to="group_norm", inputs=X, inplace=True),
    "fold": partial(normswap.fold, inputs=X, inplace=True),
    "freeze, tune": partial(normswap.freeze, inputs=X, mode="tune", inplace=True),
}


@contextmanager
def time_in_torch() -> Iterator[list[float]]:
    """Yield a list; after it, its one item is the seconds that torch.export took inside."""
    spent, export = [0.0], torch.export.export

    def timed(*args: object, **kwargs: object) -> object:
        start = time.process_time()
        try:
            return export(*args, **kwargs)  # type: ignore[arg-type]
        finally:
            spent[0] += time.process_time() - start

    torch.export.export = timed  # type: ignore[assignment]
    try:
        yield spent
    finally:
        torch.export.export = export


def measure(verb: Verb, network: str, sites: int, rounds: int) -> tuple[float, float]:
    """Seconds that the verb takes, and those of torch.export among them."""
    results = []
    for _ in range(rounds):
        model = chain(network, sites)
        with time_in_torch() as torchs:
            start = time.process_time()
            verb(model)
            results.append((time.process_time() - start, torchs[0]))
    return min(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sites", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--networks", nargs="*", default=["*"], metavar="GLOB")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = sorted(args.sites)
    for verb in VERBS.values():
        verb(chain("residual", 4))  # imports, and what torch caches
    table = Table("ms per site", *map(str, sizes), "growth", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for network in NETWORKS:
        if not any(fnmatchcase(network, glob) for glob in args.networks):
            continue
        for name, verb in VERBS.items():
            unchecked = partial(verb, check=False)
            measured = [
                (
                    *measure(verb, network, size, args.rounds),
                    measure(unchecked, network, size, args.rounds)[0],
                )
                for size in sizes
            ]
            parts = {
                f"{network}: {name}": [whole for whole, _, _ in measured],
                "  torch.export": [torchs for _, torchs, _ in measured],
                "  the check": [whole - without for whole, _, without in measured],
                "  the rest": [without - torchs for _, torchs, without in measured],
            }
            for part, seconds in parts.items():
                cells = [f"{1e3 * t / size:.2f}" for t, size in zip(seconds, sizes, strict=True)]
                table.add_row(part, *cells, growth(sizes, seconds))
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def growth(sizes: list[int], seconds: list[float]) -> str:
    if len(sizes) == 1 or min(seconds) <= 0:  # a difference of two measurements may be noise
        return ""
    return f"{math.log(seconds[-1] / seconds[-2]) / math.log(sizes[-1] / sizes[-2]):.2f}"


if __name__ == "__main__":
    main()
